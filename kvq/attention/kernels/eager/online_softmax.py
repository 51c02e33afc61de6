"""Softmax and weighted sum over keys that come piece by piece (Milakov and Gimelshein, arXiv 1805.02867).

Owns the running maximum and sum of each row. It must not know where scores and values come from.
"""

from __future__ import annotations

import torch


class OnlineSoftmax:
    """The softmax of rows whose scores come in pieces; the caller keeps the weighted sums and rescales them.

    Args:
        logits: fp32 `[B, H, R, 1]`, a score without a value that each row starts with; -inf for none.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.largest = logits
        self.total = (logits != -torch.inf).float()

    def weigh(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take more scores.

        Args:
            scores: fp32 `[B, H, R, T]`, -inf where a token is not seen; overwritten.

        Returns:
            Weights `[B, H, R, T]` of the tokens, and the factor `[B, H, R, 1]` by which earlier weighted sums shrink.
        """
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        # Where nothing was seen so far every difference would be NaN; any finite number gives weights of 0.
        base = largest.masked_fill(largest == -torch.inf, 0)
        factor = (self.largest - base).exp_()
        weights = scores.sub_(base).exp_()
        self.total = self.total * factor + weights.sum(-1, keepdim=True)
        self.largest = largest
        return weights, factor

    def normalize(self, weighted: torch.Tensor) -> torch.Tensor:
        """Return weighted sums `[B, H, R, D]` over the sum of all weights; 0 for a row that saw nothing."""
        return weighted / self.total.masked_fill(self.total == 0, 1)
