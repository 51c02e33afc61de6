"""One chunk as one store sees it, and its copies on other devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Segment:
    """The used blocks of one chunk, as one store sees them.

    Attributes:
        parts: the chunk, `[B, H, capacity, *part.shape]` for each part.
        used: blocks that belong to this store.
        capacity: blocks that the chunk has room for.
        rows: int64 `[B']`, the chunk's row for each row of the batch; None: as they are.
    """

    parts: Mapping[str, torch.Tensor]
    used: int
    capacity: int
    rows: torch.Tensor | None = None

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return blocks in batch order; views unless the batch was reordered."""
        parts = {name: part[:, :, start:stop] for name, part in self.parts.items()}
        if self.rows is None:
            return parts
        return {name: part.index_select(0, self.rows) for name, part in parts.items()}


def copy_segments(segments: Sequence[Segment], device: torch.device, *, pinned: bool) -> tuple[Segment, ...]:
    """Return segments on another device; a batch order that several share stays one.

    From pinned memory to a GPU the copies are only begun: all that follows on the same stream finds them.
    """
    orders = {id(segment.rows): segment.rows.to(device) for segment in segments if segment.rows is not None}
    with torch.inference_mode(False):
        return tuple(
            replace(
                segment,
                parts={name: _copied_to(part, device, pinned=pinned) for name, part in segment.parts.items()},
                rows=None if segment.rows is None else orders[id(segment.rows)],
            )
            for segment in segments
        )


def _copied_to(part: torch.Tensor, device: torch.device, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty_like(part, device=device, pin_memory=True).copy_(part)
    return part.to(device, non_blocking=True)
