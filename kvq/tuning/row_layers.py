"""Layers of a cache in which each run of rows is held in its own way, so that one forward tries several settings.

Rows of a batch do not see each other: what a run of rows reads is what a cache of its own would give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq.plugin_api.quantizer import Side


class OneSide(CacheLayerMixin):
    """A quantized layer of which only one side is read; the other side is read in full precision.

    Args:
        quantized: the layer with the quantized side, still empty.
        plain: transformers' own layer, still empty.
        side: the quantized side.
    """

    def __init__(self, quantized: Any, plain: Any, side: Side) -> None:
        super().__init__()
        self._quantized = quantized
        self._plain = plain
        self._side = side
        self.is_sliding = quantized.is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the layers begin by themselves."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states `[B, H, T, D]` and return all keys and values; see `KVQLayer.update`."""
        keys, values = self._quantized.update(key_states, value_states)
        plain_keys, plain_values = self._plain.update(key_states, value_states, *args, **kwargs)
        return (keys, plain_values) if self._side == "key" else (plain_keys, values)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        length: int = self._quantized.get_seq_length()
        return length

    def get_max_length(self) -> int:
        """Return -1: the layer grows without a limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward sees."""
        sizes: tuple[int, int] = self._quantized.get_mask_sizes(query_length)
        return sizes


class RowRuns(CacheLayerMixin):
    """A layer whose rows are held by several ones, an equal run of rows each.

    Args:
        parts: the layers, in the order of the rows.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self._parts = parts
        self.is_sliding = parts[0].is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the parts begin by themselves."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states `[B, H, T, D]`, a run of rows to each part, and return all keys and values."""
        runs = zip(key_states.chunk(len(self._parts)), value_states.chunk(len(self._parts)), strict=True)
        read = [part.update(*run, *args, **kwargs) for part, run in zip(self._parts, runs, strict=True)]
        keys, values = zip(*read, strict=True)
        return torch.cat(keys), torch.cat(values)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        length: int = self._parts[0].get_seq_length()
        return length

    def get_max_length(self) -> int:
        """Return -1: the layer grows without a limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward sees."""
        sizes: tuple[int, int] = self._parts[0].get_mask_sizes(query_length)
        return sizes
