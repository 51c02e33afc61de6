"""A layer of transformers that keeps its states in full precision, in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvq.errors import CacheFileError
from kvq.persistence.container import SavedTensor, TensorSpec
from kvq.persistence.header import DynamicHeader, PlainStates, SlidingHeader, name_dtypes


def describe(layer: DynamicLayer) -> DynamicHeader | SlidingHeader:
    """Return what the header says of a layer."""
    states = None
    if layer.get_seq_length():
        keys, values = _kept_states(layer)
        states = PlainStates(
            **name_dtypes(keys.dtype, values.dtype),
            batch_size=keys.shape[0],
            tokens=keys.shape[2],
            seen=layer.get_seq_length(),
            key=(keys.shape[1], keys.shape[3]),
            value=(values.shape[1], values.shape[3]),
        )
    if isinstance(layer, DynamicSlidingWindowLayer):
        return SlidingHeader(sliding_window=layer.sliding_window, states=states)
    return DynamicHeader(states=states)


def collect(layer: DynamicLayer, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
    """Yield the tensors of a layer that holds tokens, by name."""
    for name, states in zip(("key", "value"), _kept_states(layer), strict=True):
        yield f"{prefix}.{name}.states", SavedTensor.of(states)


def prepare(layer: DynamicLayer, states: PlainStates, device: torch.device) -> None:
    """Make a new layer one for states like those in the file; nothing is read yet."""
    layer.lazy_initialization(*(torch.empty(0, dtype=dtype, device=device) for dtype in states.dtypes))


def count_tokens(layer: DynamicLayer, states: PlainStates) -> int:
    """Return the tokens that a prepared layer will have been given."""
    del layer
    return states.seen


def plan(layer: DynamicLayer, states: PlainStates, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors that the file must have for a prepared layer, by name.

    Raises:
        CacheFileError: such a layer would not hold that many of the tokens.
    """
    fewest = min(states.seen, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else states.seen
    if not fewest <= states.tokens <= states.seen:
        raise CacheFileError(f"{prefix}: {states.tokens} tokens are held of {states.seen}, where {fewest} are needed")
    sides = zip(("key", "value"), (states.key, states.value), states.dtypes, strict=True)
    for name, (heads, head_dim), dtype in sides:
        yield f"{prefix}.{name}.states", TensorSpec((states.batch_size, heads, states.tokens, head_dim), dtype)


def fill(layer: DynamicLayer, states: PlainStates, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
    """Put what the file holds into a prepared layer."""
    layer.keys, layer.values = (read(f"{prefix}.{name}.states").to(layer.device) for name in ("key", "value"))
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = states.seen


def _kept_states(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values that go on being needed; a sliding layer that records its past holds more for a while."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return layer.keys, layer.values
    most = layer.sliding_window - 1
    first = max(0, layer.keys.shape[2] - most)
    return layer.keys[:, :, first:], layer.values[:, :, first:]
