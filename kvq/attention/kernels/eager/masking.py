"""Which token each query sees, cut to the tokens at hand."""

from __future__ import annotations

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.visibility import visible, with_four_dims


class RowMask:
    """The mask of a request by rows of a key-value head, `R = queries per head * Tq`, head by head.

    Args:
        request: its mask, or causality where it has none.
    """

    def __init__(self, request: AttentionRequest) -> None:
        self.request = request
        self.queries = request.query.shape[2]

    def apply(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Return scores `[B, H, R, T]` of the tokens from position `start` on, scaled, capped and masked."""
        scores = self._scale(scores)
        mask = visible(self.request, start, start + scores.shape[-1])
        return scores if mask is None else self._add(scores, self._by_head(mask))

    def apply_at(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return scores `[B, H, R, T]` of tokens at `positions`, int64 `[B, T]`, all before the first query."""
        scores = self._scale(scores)
        if self.request.mask is None:
            return scores
        mask, places = self._by_head(with_four_dims(self.request.mask)), positions[:, None, None, None]
        return self._add(scores, torch.take_along_dim(mask.expand(len(positions), -1, -1, -1, -1), places, dim=-1))

    def _scale(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.mul_(self.request.scaling)
        softcap = self.request.softcap
        return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)

    def _by_head(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a view `[B or 1, H or 1, queries per head or 1, Tq or 1, T]`."""
        per_head = self.request.queries_per_head if mask.shape[1] > 1 else 1
        by_head: torch.Tensor = mask.unflatten(1, (-1, per_head))
        return by_head

    def _add(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        by_head = scores.unflatten(2, (self.request.queries_per_head, self.queries))
        masked: torch.Tensor = (
            by_head.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else by_head.add_(mask)
        )
        return masked.flatten(2, 3)
