"""Layers of transformers that keep their states in full precision, in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvq.errors import CacheFileError
from kvq.files.container import SavedTensor, TensorSpec
from kvq.persistence.header import DynamicHeader, PlainStates, SlidingHeader, name_dtypes


class DynamicLayerFormat:
    """Layers whose whole state is keys and values of all tokens; a `LayerFormat`."""

    def describe(self, layer: DynamicLayer) -> DynamicHeader | SlidingHeader:
        """Return the header of a layer."""
        return DynamicHeader(states=self._describe_states(layer))

    def collect(self, layer: DynamicLayer, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
        """Yield the tensors of a layer that holds tokens, by name."""
        for name, states in zip(("key", "value"), self._kept_states(layer), strict=True):
            yield f"{prefix}.{name}.states", SavedTensor.of(states)

    def prepare(self, layer: DynamicLayer, states: PlainStates, device: torch.device) -> None:
        """Make a new layer one for states like those in the file; nothing is read yet."""
        layer.lazy_initialization(*(torch.empty(0, dtype=dtype, device=device) for dtype in states.dtypes))

    def count_tokens(self, layer: DynamicLayer, states: PlainStates) -> int:
        """Return the tokens that a prepared layer will have been given."""
        del layer
        return states.seen

    def plan(self, layer: Any, states: PlainStates, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the tensors that the file must have for a prepared layer, by name.

        Raises:
            CacheFileError: such a layer would not hold that many of the tokens.
        """
        fewest = self._fewest_kept(layer, states)
        if not fewest <= states.tokens <= states.seen:
            raise CacheFileError(
                f"{prefix}: {states.tokens} tokens are held of {states.seen}, where {fewest} are needed"
            )
        sides = zip(("key", "value"), (states.key, states.value), states.dtypes, strict=True)
        for name, (heads, head_dim), dtype in sides:
            yield f"{prefix}.{name}.states", TensorSpec((states.batch_size, heads, states.tokens, head_dim), dtype)

    def fill(self, layer: Any, states: PlainStates, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        """Fill a prepared layer from the file."""
        del states
        layer.keys, layer.values = (read(f"{prefix}.{name}.states").to(layer.device) for name in ("key", "value"))

    def _describe_states(self, layer: DynamicLayer) -> PlainStates | None:
        if not layer.get_seq_length():
            return None
        keys, values = self._kept_states(layer)
        return PlainStates(
            **name_dtypes(keys.dtype, values.dtype),
            batch_size=keys.shape[0],
            tokens=keys.shape[2],
            seen=layer.get_seq_length(),
            key=(keys.shape[1], keys.shape[3]),
            value=(values.shape[1], values.shape[3]),
        )

    def _kept_states(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that go on being needed."""
        return layer.keys, layer.values

    def _fewest_kept(self, layer: Any, states: PlainStates) -> int:
        """Return the fewest tokens that a layer holds of those that it was given."""
        del layer
        return states.seen


class SlidingLayerFormat(DynamicLayerFormat):
    """Layers that forget the tokens behind a sliding window."""

    def describe(self, layer: DynamicSlidingWindowLayer) -> SlidingHeader:
        """Return the header of a layer."""
        return SlidingHeader(sliding_window=layer.sliding_window, states=self._describe_states(layer))

    def fill(self, layer: Any, states: PlainStates, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        """Fill a prepared layer from the file."""
        super().fill(layer, states, prefix, read)
        layer.cumulative_length = states.seen

    def _kept_states(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # One that records its past holds more for a while.
        first = max(0, layer.keys.shape[2] - (layer.sliding_window - 1))
        return layer.keys[:, :, first:], layer.values[:, :, first:]

    def _fewest_kept(self, layer: Any, states: PlainStates) -> int:
        window: int = layer.sliding_window
        return min(states.seen, window - 1)
