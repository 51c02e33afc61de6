"""Allocations against all that there are, counted out on small instances."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from kvq.tuning import allocation
from kvq.tuning.allocation import Allocator, Choice, Option, allocate


def draw_groups(seed, groups=4, options=4, unit=64):
    """Draw groups of options; bytes are multiples of a unit, with equal ones among them."""
    random = np.random.default_rng(seed)
    return [
        [Option(name, int(random.integers(1, 12)) * unit, float(random.random())) for name in "abcdef"[:options]]
        for _ in range(groups)
    ]


def every_choice(groups):
    return [Choice(options) for options in product(*groups)]


def best_within(groups, num_bytes):
    return min((one.cost for one in every_choice(groups) if one.num_bytes <= num_bytes), default=None)


@pytest.mark.parametrize("seed", range(6))
def test_every_budget_gets_the_best_of_all_choices(seed):
    groups = draw_groups(seed)
    allocator = Allocator(groups)
    least = min(one.num_bytes for one in every_choice(groups))
    assert allocator.least_bytes == least
    for num_bytes in range(least, max(one.num_bytes for one in every_choice(groups)) + 100, 32):
        found = allocator.within(num_bytes)
        assert found.num_bytes <= num_bytes
        assert found.cost == pytest.approx(best_within(groups, num_bytes))
    assert allocator.within(least - 1) is None


@pytest.mark.parametrize("seed", range(6))
def test_a_divergence_is_reached_in_the_fewest_bytes(seed):
    groups = draw_groups(seed)
    allocator = Allocator(groups)
    costs = sorted(one.cost for one in every_choice(groups))
    for bound in np.linspace(costs[0] + 1e-9, costs[-1], 9):
        fewest = min(one.num_bytes for one in every_choice(groups) if one.cost <= bound)
        found = allocator.reaching(bound)
        assert (found.num_bytes, found.cost <= bound) == (fewest, True)
    assert allocator.reaching(costs[0] / 2) is None


def test_the_front_runs_from_the_smallest_to_the_best_and_nothing_beats_it():
    groups = draw_groups(3)
    front = Allocator(groups).front(8)
    assert front[0].num_bytes == min(one.num_bytes for one in every_choice(groups))
    assert front[-1].cost == pytest.approx(min(one.cost for one in every_choice(groups)))
    for one in front:
        assert one.cost == pytest.approx(best_within(groups, one.num_bytes))
    assert len(set(front)) == len(front) > 3


@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_are_finer_than_the_states_never_exceed_the_budget(monkeypatch, seed):
    monkeypatch.setattr(allocation, "MAX_STATES", 40)
    random = np.random.default_rng(seed)
    sizes = np.sort(random.integers(1, 1000, (5, 4)), axis=1)
    groups = [[Option(place, int(size), 1.0 / (1 + place)) for place, size in enumerate(own)] for own in sizes]
    allocator = Allocator(groups)
    slack = 5 * -(-(allocator.most_bytes - allocator.least_bytes) // 40)
    for num_bytes in range(allocator.least_bytes, allocator.most_bytes + 200, 13):
        found = allocator.within(num_bytes)
        assert found.num_bytes <= num_bytes
        if num_bytes - slack >= allocator.least_bytes:
            assert found.cost <= best_within(groups, num_bytes - slack) + 1e-9


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_limit_of_names_is_kept(seed, limit):
    groups = draw_groups(seed, groups=5)
    num_bytes = 5 * 7 * 64
    allowed = [one for one in every_choice(groups) if len({option.name for option in one.options}) <= limit]
    expected = min((one.cost for one in allowed if one.num_bytes <= num_bytes), default=math.inf)
    found = allocate(groups, lambda allocator: allocator.within(num_bytes), limit)
    if found is None:
        assert expected == math.inf
        return
    assert found in allowed
    assert found.num_bytes <= num_bytes
    assert found.cost == pytest.approx(expected, rel=0.1)  # names are given up one at a time: not always the best


def test_one_name_is_the_best_uniform_choice():
    groups = draw_groups(11, groups=6)
    num_bytes = sum(max(option.num_bytes for option in options) for options in groups)
    uniform = [sum(options[place].cost for options in groups) for place in range(4)]
    assert allocate(groups, lambda one: one.within(num_bytes), 1).cost == pytest.approx(min(uniform))
