"""The groups that crops cut, as they were dequantized then.

The tokens that a crop leaves of a group go back to the window and are quantized again with the tokens that follow them.
They are kept here too, as they were. Without this, each crop at the same place would requantize the same tokens again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kvq.store.held import Held


@dataclass(frozen=True, eq=False)
class CroppedGroup:
    """The tokens of one group that were quantized once and that a crop left of it.

    Attributes:
        start: position of the first token of the group.
        states: `[B, H, T, D]`, never written to.
    """

    start: int
    states: torch.Tensor

    @property
    def stop(self) -> int:
        """Position behind the last token that was left."""
        return self.start + self.states.shape[2]


@dataclass(frozen=True, eq=False)
class CroppedGroups:
    """The cropped groups of one side, in order of their positions; an `ExactPiece`.

    Attributes:
        groups: one entry a group, none of them empty.
    """

    groups: tuple[CroppedGroup, ...] = ()

    @classmethod
    def at(cls, starts: Iterable[int], like: torch.Tensor) -> CroppedGroups:
        """Return groups at these positions, whose states `restored` fills in; `like` is `[B, H, 0, D]`."""
        return cls(tuple(CroppedGroup(start, like) for start in starts))

    def before(self, length: int) -> CroppedGroups:
        """Return the groups that are left when the tokens from position `length` on are forgotten."""
        kept = [group for group in self.groups if group.start < length]
        if kept and kept[-1].stop > length:
            last = kept[-1]
            kept[-1] = replace(last, states=last.states[:, :, : length - last.start].clone())
        return CroppedGroups(tuple(kept))

    def cut(self, start: int, decoded: torch.Tensor) -> CroppedGroups:
        """Return the groups with one more of them cut, behind all others.

        Args:
            start: position of the first token of the group.
            decoded: the tokens that are left of it as the store holds them, `[B, H, T, D]`; copied.
        """
        states = decoded.clone()
        if self.groups and self.groups[-1].start == start:
            known = self.groups[-1].states
            states[:, :, : known.shape[2]] = known
            return CroppedGroups((*self.groups[:-1], CroppedGroup(start, states)))
        return CroppedGroups((*self.groups, CroppedGroup(start, states)))

    def without_first(self, count: int) -> CroppedGroups:
        """Return the groups that are left when the first `count` tokens, whole groups, are forgotten."""
        left = (group for group in self.groups if group.start >= count)
        return CroppedGroups(tuple(replace(group, start=group.start - count) for group in left))

    def held(self) -> Iterator[Held]:
        """Yield the states of each group."""
        yield from (Held("cropped", group.states) for group in self.groups)

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the states of each group."""
        yield from ((f"survivors.{index}", group.states) for index, group in enumerate(self.groups))

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> CroppedGroups:
        """Return the groups, of which the positions are known, with saved states."""
        return self._with_states(tensors[f"survivors.{index}"] for index in range(len(self.groups)))

    def select_rows(self, rows: torch.Tensor) -> CroppedGroups:
        """Return the groups of a batch whose row `i` was row `rows[i]`."""
        return self._with_states(group.states.index_select(0, rows.to(group.states.device)) for group in self.groups)

    def moved_to(self, device: torch.device) -> CroppedGroups:
        """Return the groups on a device."""
        return self._with_states(group.states.to(device) for group in self.groups)

    def shared(self) -> CroppedGroups:
        """Return these groups: nobody writes to them."""
        return self

    def _with_states(self, states: Iterable[torch.Tensor]) -> CroppedGroups:
        pairs = zip(self.groups, states, strict=True)
        return CroppedGroups(tuple(replace(group, states=one) for group, one in pairs))
