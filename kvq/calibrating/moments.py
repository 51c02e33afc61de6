"""Sums over the tokens of a text, from which the statistics of one side of a layer follow."""

from __future__ import annotations

import torch

from kvq.plugin_api.statistics import LayerStatistics


class Moments:
    """Sums of states `[B, H, T, D]` that come in any number of pieces; kept in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = torch.zeros(0, dtype=torch.float64)
        self._minimum = self._maximum = torch.zeros(0)

    def add(self, states: torch.Tensor) -> None:
        """Count the tokens of all rows; the states are not kept."""
        batch, _, tokens, _ = states.shape
        if not batch * tokens:
            return
        own = states.float()
        total, squares = own.sum((0, 2)), torch.einsum("bhti,bhtj->hij", own, own)
        minimum, maximum = own.amin((0, 2)).cpu(), own.amax((0, 2)).cpu()
        if not self.count:
            self._sum, self._squares = total.cpu().double(), squares.cpu().double()
            self._minimum, self._maximum = minimum, maximum
        else:
            self._sum += total.cpu()
            self._squares += squares.cpu()
            self._minimum, self._maximum = self._minimum.minimum(minimum), self._maximum.maximum(maximum)
        self.count += batch * tokens

    @property
    def second_moment(self) -> torch.Tensor:
        """The mean of `x x^T`, float32 `[H, D, D]`; only after tokens were added."""
        return (self._squares / self.count).float()

    def to_statistics(self, queries: Moments | None) -> LayerStatistics:
        """Return what the sums say; only after tokens were added.

        Args:
            queries: those of the queries that read these states, or None.
        """
        return LayerStatistics(
            self.second_moment,
            (self._sum / self.count).float(),
            self._minimum.clone(),  # a tensor of inference mode refuses much outside of it
            self._maximum.clone(),
            None if queries is None else queries.second_moment,
        )
