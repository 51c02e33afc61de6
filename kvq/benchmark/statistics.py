"""Medians, their intervals and ratios of times that were taken round by round.

Times have heavy tails, so everything here is an order statistic. The interval of a median is free of assumptions about
how times are distributed: the number of values below the true median is binomial.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A median and its interval.

    Attributes:
        median: the values' median.
        low: lower end of its 95 % interval; the least value if there are too few for an interval.
        high: upper end of the interval; the greatest value if there are too few.
        count: number of values.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        ordered = sorted(values)
        below = interval_rank(len(ordered))
        return cls(statistics.median(ordered), ordered[below], ordered[-1 - below], len(ordered))

    def contains(self, value: float) -> bool:
        """Whether `value` lies within the interval."""
        return self.low <= value <= self.high


def interval_rank(count: int) -> int:
    """Return how many of `count` sorted values may be left out at either end of the interval of their median.

    The interval from the value with that index to its mirror image holds the true median with at least 95 %. If no
    interval does, the index is 0, which means the whole range.
    """
    rank, tail = 0, 0.5**count
    while rank + 1 < count / 2:
        tail += math.comb(count, rank + 1) * 0.5**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank += 1
    return rank


def ratio(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Return the spread of the ratios of values to others of the same round; a disturbance of a round affects both."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def is_tie(compared: Spread) -> bool:
    """Whether a ratio is within its spread of one."""
    return compared.contains(1.0)
