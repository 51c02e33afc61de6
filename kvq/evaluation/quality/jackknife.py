"""The spread of any figure of all tokens by the jackknife, which leaves out one sequence at a time.

The numbers are sorted once and added up once: the figures without each sequence cost no more than the figure itself, up
to a factor that does not grow with the sequences. Source: Efron and Stein, "The jackknife estimate of variance", 1981.
"""

from __future__ import annotations

import math

import torch

from kvq.evaluation.quality.metrics import nearest_rank, student_quantile


class WithoutEach:
    """Figures of numbers without the first row, without the second one, and so on.

    Args:
        numbers: one for each token, float `[N, S]`.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._sorted, order = numbers.flatten().sort()
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        self._places = places.view_as(numbers).sort(dim=1).values

    def quantiles(self, share: float) -> torch.Tensor:
        """Return the number that `share` of the others do not exceed, for each row, float `[N]`; see `quantile`.

        A row without others has none: nan.
        """
        rows, tokens = self._places.shape
        if rows < 2:
            return torch.full((rows,), math.nan)
        rank = nearest_rank((rows - 1) * tokens, share) - 1
        others_before = self._places - torch.arange(tokens, device=self._places.device)
        own_before = (others_before <= rank).sum(dim=1)
        return self._sorted[rank + own_before]


def means_without_each(numbers: torch.Tensor) -> torch.Tensor:
    """Return the mean of all rows but one, for each row of `[N, S]`, float64 `[N]`."""
    sums = numbers.double().sum(dim=1)
    return (sums.sum() - sums) / (numbers.numel() - numbers.shape[1])


def half_width(left_out: torch.Tensor) -> float:
    """Return the half-width of the 95 % interval of a figure from its values without each sequence, float `[N]`.

    Of a mean it is that of `Estimate.of_parts`. Of a quantile it is rough: few tokens decide it. A single sequence has
    none: nan.
    """
    count = len(left_out)
    if count < 2:
        return math.nan
    variance = (count - 1) * float(left_out.double().var(correction=0))
    return student_quantile(count - 1) * math.sqrt(variance)
