"""What a configuration has that an engine's setting has not, in words, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvq.config import KVQCacheConfig, ResolvedLayer, ResolvedSide
from kvq.exporting.engine import Engine, EngineSetting
from kvq.exporting.nearest import Wanted
from kvq.exporting.state_format import FullPrecision, Rotated, StateFormat
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Side


def list_losses(
    config: KVQCacheConfig, layer: ResolvedLayer, engine: Engine, setting: EngineSetting, wanted: Wanted
) -> Iterator[str]:
    """Yield a line for each thing that is lost, or changes.

    Args:
        config: the configuration.
        layer: its settings for a layer without settings of its own.
        engine: the engine.
        setting: the engine's setting.
        wanted: what the configuration stores.
    """
    yield from _side("key", layer.key, setting.key, wanted.key_bits, wanted.head_dim)
    yield from _side("value", layer.value, setting.value, wanted.value_bits, wanted.head_dim)
    if not engine.sides_differ and layer.key.nbits != layer.value.nbits:
        yield f"keys and values apart ({layer.key.nbits:g} and {layer.value.nbits:g} bits): one format for both"
    if layer.residual_length:
        yield f"the window: the newest {layer.residual_length} tokens are read from their codes too"
    if layer.sink_length:
        yield f"the sinks: the first {layer.sink_length} tokens are read from their codes too"
    yield from _layers(config, engine)


def name_skipped(engine: Engine, kept: Sequence[int]) -> tuple[str, ...]:
    """Return the arguments that keep layers in full precision, where the engine can."""
    return (engine.skip_option, *map(str, kept)) if engine.skip_option and kept else ()


def _side(side: Side, own: ResolvedSide, there: StateFormat, bits: float, head_dim: int) -> Iterator[str]:
    name, found = f"{side}s", there.bits(head_dim)
    yield f"{name}: {bits:.2f} bits an element become {found:.2f}"
    if isinstance(there, FullPrecision):
        return
    yield f"{name}: {_describe_groups(own)} become {there.groups}"
    if own.rotation != "none" and not isinstance(there, Rotated):
        yield f"{name}: the rotation ({own.rotation})"
    if own.balance != "none":
        yield f"{name}: the balance ({own.balance})"
    if own.clip != "none":
        yield f"{name}: the clipping ({own.clip})"
    if own.rounding != "nearest":
        yield f"{name}: the rounding ({own.rounding})"


def _describe_groups(own: ResolvedSide) -> str:
    if not own.backend.uses_group_size:
        return f"the groups of {own.backend.name}"
    kind = "tokens of a channel" if own.granularity is Granularity.PER_CHANNEL else "channels of a token"
    return f"groups of {own.group_size} {kind}"


def _layers(config: KVQCacheConfig, engine: Engine) -> Iterator[str]:
    settings = [layer for layer in config.layers.values() if not layer.full_precision]
    if settings:
        yield f"settings of single layers: {len(settings)} entries become one setting for all"
    if len(settings) < len(config.layers) and not engine.skip_option:
        yield "layers in full precision: they are quantized like the others"
