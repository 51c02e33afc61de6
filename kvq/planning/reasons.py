"""Why a layer is held as it is, in words."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from kvq.config import KVQCacheConfig
from kvq.config.layer_selector import find_selector
from kvq.layers.model_layers import LATENT_VALUE_BITS, is_latent
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.layer_kinds import kind_of


class Reasons:
    """Explains layers of one cache.

    Args:
        config: the cache's configuration.
        model_config: the text model's configuration.
        layers: the cache's layers.
    """

    def __init__(self, config: KVQCacheConfig, model_config: PretrainedConfig, layers: list[Any]) -> None:
        self.config = config
        self.layers = layers
        self.is_latent = is_latent(model_config)

    def explain(self, layer_idx: int, outline: Any) -> str:
        """Return why a layer is held as it is.

        Args:
            layer_idx: index of the layer.
            outline: the layer of transformers' own cache.
        """
        window = getattr(outline, "sliding_window", None)
        entry = find_selector(self.config.layers, layer_idx, len(self.layers))
        place = "default" if entry is None else f"layers[{entry!r}]"
        if isinstance(self.layers[layer_idx], KVQLayer):
            beside = kind_of(outline).beside
            return "; ".join(filter(None, (place, self._why_sliding(window), self._latent, beside)))
        if entry is not None and self.config.layers[entry].full_precision:
            return f"{place}: full_precision"
        return kind_of(outline).reason.format(window=window)

    @property
    def _latent(self) -> str:
        part = f"latent attention: keys are the latent, values the rope part, at {LATENT_VALUE_BITS} bits or more"
        return part if self.is_latent else ""

    def _why_sliding(self, window: int | None) -> str:
        if window is None:
            return ""
        why = "sliding: quantize" if self.config.sliding == "quantize" else "the model has no other layers"
        return f"sliding window of {window} tokens, quantized since {why}"
