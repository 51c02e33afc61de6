"""What crops left of groups that they cut, as it was dequantized then.

The survivors of a cut group go back to the window and are quantized again with the tokens that follow them. Were the
group cut once more, what comes out of it by then would be quantized a third time, and so on with every crop at about
the same place: a reply that is generated anew and anew. So the survivors are kept as they were, and come back as that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Survivors:
    """The tokens of one group that were quantized once and cut out of it.

    Attributes:
        start: position of the first token of the group.
        states: `[B, H, T, D]`, never written to.
    """

    start: int
    states: torch.Tensor

    @property
    def stop(self) -> int:
        """Position behind the last survivor."""
        return self.start + self.states.shape[2]


@dataclass(frozen=True)
class SurvivorLog:
    """The survivors of every cut group of one side, in order of their positions.

    Attributes:
        groups: one entry a group, none of them empty.
    """

    groups: tuple[Survivors, ...] = ()

    def before(self, length: int) -> SurvivorLog:
        """Return what is left of it when the tokens from position `length` on are forgotten."""
        kept = [group for group in self.groups if group.start < length]
        if kept and kept[-1].stop > length:
            last = kept[-1]
            kept[-1] = replace(last, states=last.states[:, :, : length - last.start].clone())
        return SurvivorLog(tuple(kept))

    def cut(self, start: int, decoded: torch.Tensor) -> SurvivorLog:
        """Return the log with one more group cut, at the end of everything that is kept.

        Args:
            start: position of the first token of the group.
            decoded: what the store holds of its survivors, `[B, H, T, D]`; copied.
        """
        states = decoded.clone()
        if self.groups and self.groups[-1].start == start:
            known = self.groups[-1].states
            states[:, :, : known.shape[2]] = known
            return SurvivorLog((*self.groups[:-1], Survivors(start, states)))
        return SurvivorLog((*self.groups, Survivors(start, states)))

    def moved_to(self, device: torch.device) -> SurvivorLog:
        """Return the log with its states on a device."""
        return SurvivorLog(tuple(replace(group, states=group.states.to(device)) for group in self.groups))

    def select_rows(self, rows: torch.Tensor) -> SurvivorLog:
        """Return the log of a batch whose row `i` was row `rows[i]`."""
        return SurvivorLog(
            tuple(
                replace(group, states=group.states.index_select(0, rows.to(group.states.device)))
                for group in self.groups
            )
        )
