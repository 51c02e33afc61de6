"""Medians, their intervals, ratios and ties on numbers whose answers are known."""

from __future__ import annotations

import math

import pytest

from kvq.benchmark.statistics import Spread, interval_rank, is_tie, ratio

# Ranks of the distribution-free 95 % interval of a median, as tables of order statistics have them (counted from 1).
TABLE = {5: (1, 5), 6: (1, 6), 7: (1, 7), 8: (1, 8), 9: (2, 8), 10: (2, 9), 15: (4, 12), 20: (6, 15), 25: (8, 18)}


@pytest.mark.parametrize(("count", "ranks"), TABLE.items())
def test_the_interval_of_a_median_has_the_ranks_of_the_tables(count, ranks):
    spread = Spread.of([float(value) for value in range(1, count + 1)])
    assert (spread.low, spread.high) == ranks


@pytest.mark.parametrize("count", [6, 9, 21, 40])
def test_the_interval_covers_at_least_95_percent_and_no_narrower_one_does(count):
    def coverage(rank):
        return 1 - 2 * sum(math.comb(count, below) for below in range(rank + 1)) / 2**count

    rank = interval_rank(count)
    assert coverage(rank) >= 0.95 > coverage(rank + 1)


@pytest.mark.parametrize("values", [[7.0], [7.0, 9.0]])
def test_too_few_values_give_their_whole_range(values):
    spread = Spread.of(values)
    assert (spread.low, spread.high, spread.count) == (min(values), max(values), len(values))
    assert spread.median == sum(values) / len(values)


def test_an_outlier_moves_neither_median_nor_interval():
    calm = Spread.of([10.0 + place / 10 for place in range(11)])
    disturbed = Spread.of([10.0 + place / 10 for place in range(10)] + [1e6])
    assert (calm.median, calm.low, calm.high) == (disturbed.median, disturbed.low, disturbed.high)


def test_a_ratio_is_taken_within_a_round():
    """Every other round is ten times slower for both; ratios of medians over all rounds would not be 2 to the digit."""
    slow = [1.0, 10.0] * 4 + [1.0]
    compared = ratio([2 * value for value in slow], slow)
    assert (compared.median, compared.low, compared.high) == (2.0, 2.0, 2.0)


def test_a_difference_within_the_spread_is_a_tie_and_one_beyond_it_is_not():
    one = [1.0] * 9
    assert is_tie(ratio([0.9, 0.95, 0.97, 0.99, 1.01, 1.02, 1.05, 1.1, 1.2], one))
    assert not is_tie(ratio([1.01, 1.02, 1.02, 1.03, 1.03, 1.04, 1.05, 1.1, 1.2], one))
    assert not is_tie(ratio([0.9] * 8 + [3.0], one))


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio([1.0, 2.0], [1.0])
