"""The first real tokens of each row, kept exact beside the store.

The store keeps a slot for every token, so positions agree across rows of unequal padding; sinks are laid over their
slots on reading. In the slots themselves stand values that leave the scale of their group as it would be without
them, since sinks are often outliers and padding is noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kvq.store.held import Held


@dataclass(frozen=True, eq=False)
class SinkTokens:
    """The sinks of one side of one layer; an `ExactPiece`.

    Attributes:
        length: sink tokens of each row.
        starts: position of the first real token of each row; below 0 where it is forgotten.
        states: `[B, H, S, D]`, never written to: as many as any row has among the stored tokens, up to `length`; None
            before the first.
    """

    length: int
    starts: tuple[int, ...]
    states: torch.Tensor | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """Position behind the last sink of each row."""
        return tuple(start + self.length for start in self.starts)

    def count_among(self, stored: int) -> int:
        """Return how many sinks the row with the most of them has among the first `stored` tokens."""
        return max(0, min(self.length, stored - min(self.starts)))

    def withhold(self, states: torch.Tensor, position: int, block_length: int) -> tuple[SinkTokens, torch.Tensor]:
        """Keep the sinks among tokens that are about to be quantized.

        Args:
            states: `[B, H, T, D]`, T a multiple of `block_length`.
            position: position of the first of them.
            block_length: tokens that are quantized together.

        Returns:
            The sinks with those of `states`; and the states with padding and sinks replaced, block by block, by the
            block's first other token, or by zeros where it has none. `self` and `states` if there is nothing to keep.
        """
        if position >= max(self.ends):
            return self, states
        replaced = states.clone()
        for row, end in enumerate(self.ends):
            count = min(max(0, end - position), states.shape[2])
            whole = count // block_length * block_length
            replaced[row, :, :whole] = 0
            if whole < count:
                replaced[row, :, whole:count] = states[row, :, count : count + 1]
        return self._keep(states, position), replaced

    def lay_over(self, out: torch.Tensor, position: int, stored: int) -> None:
        """Write the sinks into `out` `[B, H, T, D]`, whose first token has that position, up to position `stored`."""
        if self.states is None:
            return
        for row, start in enumerate(self.starts):
            first, last = max(start, position), min(start + self.length, stored, position + out.shape[2])
            if first < last:
                out[row, :, first - position : last - position] = self.states[row, :, first - start : last - start]

    def without_first(self, count: int) -> SinkTokens:
        """Return the sinks of tokens of which the first `count` are forgotten: positions before those left are below 0.

        Where no sink is left in any row, there are none from then on.
        """
        starts = tuple(start - count for start in self.starts)
        if max(starts) + self.length > 0:
            return replace(self, starts=starts)
        return SinkTokens(0, starts)

    def held(self) -> Iterator[Held]:
        """Yield the states, if there are any."""
        if self.states is not None:
            yield Held("sinks", self.states)

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the states, if there are any."""
        if self.states is not None:
            yield "sinks", self.states

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> SinkTokens:
        """Return sinks with saved states."""
        return replace(self, states=tensors.get("sinks"))

    def select_rows(self, rows: torch.Tensor) -> SinkTokens:
        """Return the sinks of a batch whose row `i` was row `rows[i]`."""
        states = None if self.states is None else self.states.index_select(0, rows.to(self.states.device))
        return SinkTokens(self.length, tuple(self.starts[row] for row in rows.tolist()), states)

    def moved_to(self, device: torch.device) -> SinkTokens:
        """Return the sinks on a device."""
        return self if self.states is None else replace(self, states=self.states.to(device))

    def shared(self) -> SinkTokens:
        """Return these sinks: nobody writes to them."""
        return self

    def _keep(self, states: torch.Tensor, position: int) -> SinkTokens:
        wanted = self.count_among(position + states.shape[2])
        if not wanted:
            return self
        kept = self._copied(states, wanted)
        for row, start in enumerate(self.starts):
            first, last = max(start, position), min(start + self.length, position + states.shape[2])
            if first < last:
                kept[row, :, first - start : last - start] = states[row, :, first - position : last - position]
        return replace(self, states=kept)

    def _copied(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Return a copy of the sinks, with room for `count` or more of the kind of `states`."""
        batch, heads, _, dim = states.shape
        held = 0 if self.states is None else self.states.shape[2]
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = torch.zeros((batch, heads, max(count, held), dim), dtype=states.dtype, device=states.device)
        if self.states is not None:
            copied[:, :, :held] = self.states
        return copied
