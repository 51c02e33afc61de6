"""When a cache quantizes: how many tokens come before the step that does."""

from __future__ import annotations

from transformers.cache_utils import Cache, QuantizedLayer

from kvq.layers.quantized_layer import KVQLayer


def steps_before_flush(cache: Cache) -> int | None:
    """Return how many single tokens the cache takes before the one at which it flushes; None if it never does."""
    counts = [count for layer in cache.layers if (count := _steps_before_flush(layer)) is not None]
    return min(counts) if counts else None


def flush_interval(cache: Cache) -> int | None:
    """Return the tokens from one flush to the next, in the mean; None if the cache never flushes."""
    turns = {layer.flush_delay for layer in cache.layers if isinstance(layer, KVQLayer)}
    for layer in cache.layers:
        if isinstance(layer, KVQLayer):
            return max(1, layer.flush_length // len(turns))
        if isinstance(layer, QuantizedLayer):
            return int(layer.residual_length)
    return None


def _steps_before_flush(layer: object) -> int | None:
    if isinstance(layer, KVQLayer):
        stored = layer.side("key").store.length
        waiting = layer.settings.residual_length + layer.flush_delay
        return stored + layer.flush_length + waiting - layer.held_length - 1
    if isinstance(layer, QuantizedLayer):
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        return int(layer.residual_length) - waiting - 1
    return None
