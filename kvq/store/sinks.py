"""The first real tokens of each row, kept exact beside the store.

The store keeps a slot for every token, so that positions agree across rows whatever their padding; sinks are laid over
their slots on reading. In the slots themselves stand values that leave the scale of their group as it would be without
them, since sinks are often outliers and padding is noise.
"""

from __future__ import annotations

import torch


class SinkTokens:
    """Sinks of one side of one layer.

    Args:
        length: sink tokens of each row.
        starts: position of the first real token of each row.
    """

    def __init__(self, length: int, starts: tuple[int, ...]) -> None:
        self.length = length
        self.starts = starts
        self.states: torch.Tensor | None = None
        """`[B, H, S, D]`: as many as any row has among the stored tokens, up to `length`; None before the first."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Position behind the last sink of each row."""
        return tuple(start + self.length for start in self.starts)

    def count_among(self, stored: int) -> int:
        """Return how many sinks the row with the most of them has among the first `stored` tokens."""
        return max(0, min(self.length, stored - min(self.starts)))

    def withhold(self, states: torch.Tensor, position: int, block_length: int) -> torch.Tensor:
        """Keep the sinks among tokens that are about to be quantized.

        Args:
            states: `[B, H, T, D]`, T a multiple of `block_length`.
            position: position of the first of them.
            block_length: tokens that are quantized together.

        Returns:
            The states with padding and sinks replaced, block by block, by the block's first other token, or by zeros
            where it has none; `states` itself if there is nothing to replace.
        """
        if position >= max(self.ends):
            return states
        if self.length:
            self._keep(states, position)
        replaced = states.clone()
        for row, end in enumerate(self.ends):
            count = min(max(0, end - position), states.shape[2])
            whole = count // block_length * block_length
            replaced[row, :, :whole] = 0
            if whole < count:
                replaced[row, :, whole:count] = states[row, :, count : count + 1]
        return replaced

    def lay_over(self, out: torch.Tensor, position: int, stored: int) -> None:
        """Write the sinks into `out` `[B, H, T, D]`, whose first token has that position, up to position `stored`."""
        if self.states is None:
            return
        for row, start in enumerate(self.starts):
            first, last = max(start, position), min(start + self.length, stored, position + out.shape[2])
            if first < last:
                out[row, :, first - position : last - position] = self.states[row, :, first - start : last - start]

    def select_rows(self, chosen: list[int]) -> SinkTokens:
        """Return the sinks of the chosen rows, as a new object."""
        other = SinkTokens(self.length, tuple(self.starts[row] for row in chosen))
        if self.states is not None:
            # A tensor made under inference_mode could not be written to outside of it.
            with torch.inference_mode(False):
                other.states = torch.empty_like(self.states[:1].expand(len(chosen), -1, -1, -1))
            other.states.copy_(self.states[chosen])
        return other

    def copy(self) -> SinkTokens:
        """Return an independent copy."""
        return self.select_rows(list(range(len(self.starts))))

    def moved_to(self, device: torch.device) -> SinkTokens:
        """Return an independent copy on another device."""
        other = self.copy()
        other.states = None if other.states is None else other.states.to(device)
        return other

    def _keep(self, states: torch.Tensor, position: int) -> None:
        wanted, kept = self.count_among(position + states.shape[2]), self.states
        if not wanted:
            return
        if kept is None or kept.shape[2] < wanted:
            kept = self._grown(states, wanted)
        for row, start in enumerate(self.starts):
            first, last = max(start, position), min(start + self.length, position + states.shape[2])
            if first < last:
                kept[row, :, first - start : last - start] = states[row, :, first - position : last - position]
        self.states = kept

    def _grown(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Return room for `count` sinks of the kind of `states`, with those that are kept."""
        batch, heads, _, dim = states.shape
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            grown = torch.zeros((batch, heads, count, dim), dtype=states.dtype, device=states.device)
        if self.states is not None:
            grown[:, :, : self.states.shape[2]] = self.states
        return grown
