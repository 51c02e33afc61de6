"""A configuration carried over to an engine: the nearest setting, how to choose it there, and what is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from kvq.config import KVQCacheConfig, ResolvedLayer
from kvq.config.layer_selector import LayerSelector
from kvq.errors import EvaluationError
from kvq.exporting.engine import Engine, EngineSetting
from kvq.exporting.losses import list_losses, name_skipped
from kvq.exporting.nearest import Wanted, choose_nearest
from kvq.plugin_api.quantizer import Side

CountBits = Callable[[ResolvedLayer, Side, int], float]
"""Takes the settings of a layer, a side and the elements of a head; returns the stored bits of an element."""
USUAL_HEAD_DIM = 128
"""Elements of a head where no model says."""


@dataclass(frozen=True)
class CarriedOver:
    """The nearest setting of an engine.

    Attributes:
        engine: the engine.
        setting: its setting.
        wanted: what the configuration stores.
        kept: layers that the configuration keeps in full precision.
        losses: what is lost or changes, a line each.
    """

    engine: Engine
    setting: EngineSetting
    wanted: Wanted
    kept: tuple[int, ...]
    losses: tuple[str, ...]

    @property
    def skipped(self) -> tuple[int, ...]:
        """Layers that stay in full precision there too."""
        return self.kept if self.engine.skip_option else ()

    def list_arguments(self, setting: EngineSetting | None = None) -> tuple[str, ...]:
        """Return the command that starts the engine with a setting, the nearest one by default."""
        arguments = (setting or self.setting).arguments
        return (*self.engine.command, *arguments, *name_skipped(self.engine, self.kept))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        head_dim = self.wanted.head_dim
        return {
            "engine": self.engine.name,
            "setting": self.setting.label,
            "arguments": list(self.list_arguments()),
            "file": list(self.setting.file),
            "bits": {"key": self.setting.key.bits(head_dim), "value": self.setting.value.bits(head_dim)},
            "wanted_bits": {"key": self.wanted.key_bits, "value": self.wanted.value_bits},
            "head_dim": head_dim,
            "lost": list(self.losses),
            "remarks": [*self.setting.remarks, *self.engine.remarks],
            "source": self.engine.source,
        }


def carry_over(
    config: KVQCacheConfig, engine: Engine, count_bits: CountBits, model_config: PretrainedConfig | None = None
) -> CarriedOver:
    """Return the setting of an engine that is nearest to a configuration.

    Args:
        config: the configuration.
        engine: the engine.
        count_bits: counts the bits of a layer's side.
        model_config: the model's configuration, which knows the layers and the size of heads.

    Raises:
        EvaluationError: nothing is quantized, layers are counted from the end without a model, or nothing fits.
    """
    head_dim = USUAL_HEAD_DIM if model_config is None else find_head_dim(model_config)
    layers = [
        config.for_layer(index, count) for count in [_count_layers(config, model_config)] for index in range(count)
    ]
    quantized = [layer for layer in layers if not layer.full_precision]
    if not quantized:
        raise EvaluationError("the configuration keeps every layer in full precision; there is nothing to carry over")
    key, value = (sum(count_bits(one, side, head_dim) for one in quantized) / len(quantized) for side in _SIDES)
    wanted = Wanted(key, value, head_dim)
    setting = choose_nearest(engine, wanted)
    kept = tuple(index for index, layer in enumerate(layers) if layer.full_precision)
    general = config.replace(layers={}).for_layer(0)
    return CarriedOver(engine, setting, wanted, kept, tuple(list_losses(config, general, engine, setting, wanted)))


def find_head_dim(model_config: PretrainedConfig) -> int:
    """Return the elements of a head of the keys.

    Raises:
        EvaluationError: the model's attention is latent, which engines store in ways of their own.
    """
    text = model_config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise EvaluationError("the model's attention is latent (MLA), which engines store in formats of its own")
    own: int | None = getattr(text, "head_dim", None)
    return own or text.hidden_size // text.num_attention_heads


def _count_layers(config: KVQCacheConfig, model_config: PretrainedConfig | None) -> int:
    if model_config is not None:
        return int(model_config.get_text_config().num_hidden_layers)
    if config.needs_layer_count:
        raise EvaluationError("the configuration counts layers from the end; give --model, which has their number")
    # One more, for all the layers that have no settings of their own.
    return max((LayerSelector.parse(text).stop for text in config.layers), default=0) + 1


_SIDES: tuple[Side, Side] = ("key", "value")
