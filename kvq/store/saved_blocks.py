"""The blocks of a store as they are saved: in runs that share one batch order, without the rows that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch

from kvq.store.chunks import ChunkedStore
from kvq.store.own_dtypes import without_autocast
from kvq.store.segments import Segment


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring segments with the same batch order, of as many rows.

    Attributes:
        segments: never empty.
        chosen: int64 `[B0]`, the rows of the chunks that the batch still reads, or None: all of them.
        rows: int64 `[B]`, for each row of the batch its place among the chosen, or None: as they are.
    """

    segments: tuple[Segment, ...]
    chosen: torch.Tensor | None
    rows: torch.Tensor | None

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Run:
        """Join segments that have the same `rows`, and chunks of as many."""
        joined = tuple(segments)
        if joined[0].rows is None:
            return cls(joined, None, None)
        chosen, rows = torch.unique(joined[0].rows, return_inverse=True)
        return cls(joined, chosen, rows)

    @property
    def blocks(self) -> int:
        """Blocks in the run."""
        return sum(segment.used for segment in self.segments)

    @property
    def row_count(self) -> int:
        """Rows that `read` returns."""
        any_part = next(iter(self.segments[0].parts.values()))
        return any_part.shape[0] if self.chosen is None else len(self.chosen)

    def read(self, name: str) -> torch.Tensor:
        """Return one part of all blocks, `[B0, H, blocks, *shape]`."""
        used = [segment.parts[name][:, :, : segment.used] for segment in self.segments]
        with without_autocast(used[0].device):
            part = torch.cat(used, dim=2) if len(used) > 1 else used[0]
        return part if self.chosen is None else part.index_select(0, self.chosen)


def find_runs(store: ChunkedStore) -> list[Run]:
    """Return the runs of a store in the order of their tokens."""
    return [Run.of(group) for _, group in groupby(store.segments, key=_batch_order)]


def _batch_order(segment: Segment) -> tuple[int, tuple[int, ...] | None]:
    rows = next(iter(segment.parts.values())).shape[0]
    return rows, None if segment.rows is None else tuple(segment.rows.tolist())
