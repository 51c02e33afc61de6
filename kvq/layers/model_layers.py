"""The layers of a cache for one model: which are quantized, which stay those of transformers, and what is refused.

It asks transformers for its own list and replaces the plain layers, so a kind of layer that it does not know stays as
transformers made it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvq.config import KVQCacheConfig, ResolvedLayer
from kvq.errors import ModelError
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.sliding_layer import SlidingKVQLayer
from kvq.transformers_seams.layer_kinds import Replaced, kind_of, new_carrier

LATENT_VALUE_BITS = 8
"""Fewest bits for the values of latent attention, which are the part of the keys that the position rotates."""


@dataclass(frozen=True)
class DecoderConfig:
    """The parts of a model's configuration that a cache reads.

    Attributes:
        layers: describes the layers of the decoder; for some encoder-decoder models a copy.
        attention: tells the attention that is active in the decoder; the model's own object.
        is_encoder_decoder: whether the decoder also attends to an encoder.
    """

    layers: PretrainedConfig
    attention: PretrainedConfig
    is_encoder_decoder: bool

    @classmethod
    def of(cls, model: PreTrainedModel | PretrainedConfig) -> DecoderConfig:
        """Read a model or its configuration.

        Raises:
            ModelError: it is neither.
        """
        config = model if isinstance(model, PretrainedConfig) else getattr(model, "config", None)
        if not isinstance(config, PretrainedConfig):
            raise ModelError(f"model={type(model).__name__} is neither a model of transformers nor its configuration")
        text = config.get_text_config(decoder=True)
        if not getattr(config, "is_encoder_decoder", False):
            return cls(text, text, is_encoder_decoder=False)
        if text is config or type(text) is not type(config):
            return cls(text, text, is_encoder_decoder=True)
        # One flat configuration for both halves, of which `text` is a copy with the decoder's sizes.
        layers = copy.deepcopy(text)
        layers.is_encoder_decoder = False
        layers.num_hidden_layers = getattr(config, "num_decoder_layers", None) or layers.num_hidden_layers
        return cls(layers, config, is_encoder_decoder=True)


def build_layers(
    config: KVQCacheConfig,
    model_config: PretrainedConfig,
    padding: tuple[int, ...] | None = None,
    *,
    bounded: bool = True,
) -> list[Any]:
    """Return transformers' own list of layers with the plain ones replaced; all, where nothing else is there.

    Args:
        config: the cache's configuration.
        model_config: the decoder's configuration.
        padding: tokens of left padding in each row, or None.
        bounded: whether layers that slide forget what is behind their window; not where they attend to an encoder.

    Raises:
        ConfigError: `layers` does not fit the model.
        ModelError: nothing in this model would be quantized.
    """
    layers: list[Any] = DynamicCache(config=model_config).layers
    replaced = _find_replaced(layers, Replaced.ALWAYS)
    if config.sliding == "quantize" or not replaced:
        replaced |= _find_replaced(layers, Replaced.ON_REQUEST)
    settings = {index: config.for_layer(index, len(layers)) for index in replaced}
    quantized = {index for index in replaced if not settings[index].full_precision}
    if not quantized:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ModelError(
            f"nothing in this model would be quantized: its layers are {kinds or 'none'}, and `layers` keeps "
            f"{len(replaced)} of them in full precision; use DynamicCache, or choose fewer exceptions"
        )
    if is_latent(model_config):
        settings |= {index: _spare_rope_part(settings[index]) for index in quantized}
    if not bounded:  # layers of one kind share a mask, so those in full precision hold all tokens too
        layers = [DynamicLayer() if kind_of(layer).slides and index in replaced else layer
                  for index, layer in enumerate(layers)]  # fmt: skip
    chunk_length = getattr(model_config, "attention_chunk_size", None)
    return [
        _quantized(index, settings[index], padding, layer, chunk_length=chunk_length) if index in quantized else layer
        for index, layer in enumerate(layers)
    ]


def _quantized(
    index: int, settings: ResolvedLayer, padding: tuple[int, ...] | None, layer: Any, *, chunk_length: int | None
) -> KVQLayer:
    """Return the quantized layer in the place of one of transformers, where windows and chunks share a class."""
    if kind_of(layer).slides:
        window = layer.sliding_window
        return SlidingKVQLayer(index, settings, window, padding, is_chunked=window == chunk_length)
    return KVQLayer(index, settings, padding, new_carrier(layer))


def _find_replaced(layers: list[Any], when: Replaced) -> set[int]:
    return {index for index, layer in enumerate(layers) if kind_of(layer).replaced is when}


def is_latent(model_config: PretrainedConfig) -> bool:
    """Return whether the model caches latents (MLA): "keys" are the latent, "values" the rope part of the keys."""
    return bool(getattr(model_config, "kv_lora_rank", None))


def _spare_rope_part(settings: ResolvedLayer) -> ResolvedLayer:
    """Return settings with enough bits for values that are the rope part of the keys.

    It is a small share of the bytes, 64 of 576 elements of a token in DeepSeek-V3, and the scores of all heads need it.
    """
    if settings.value.nbits >= LATENT_VALUE_BITS:
        return settings
    backend = settings.value.backend
    if LATENT_VALUE_BITS not in backend.capabilities.nbits:
        raise ModelError(
            "the values that this model caches are the rope part of its keys (multi-head latent attention), which "
            f"takes no fewer than {LATENT_VALUE_BITS} bits, and backend {backend.name!r} has no such codes: choose "
            "another one for the values, backend={'key': ..., 'value': ...}"
        )
    return replace(settings, value=replace(settings.value, nbits=float(LATENT_VALUE_BITS)))
