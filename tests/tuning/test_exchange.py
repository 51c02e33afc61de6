"""Exchanges between groups, judged by a divergence that is known here and not a sum of single effects."""

from __future__ import annotations

import pytest
import torch

from kvq.tuning.allocation import Allocator, Choice, Option
from kvq.tuning.exchange import list_exchanges, refine

GROUPS = [
    [Option("small", 1, 0.40), Option("large", 2, 0.10)],
    [Option("small", 1, 0.41), Option("large", 2, 0.10)],
    [Option("small", 1, 0.60), Option("large", 2, 0.10)],
]


def names(choice):
    return [one.name for one in choice.options]


def measure(choices):
    """By the sum of single effects group 0 is the one to be small; in truth it is group 1."""
    return [
        torch.full((2, 50), 1.0 if one.options[1].name == "small" and one.options[0].name == "large" else 2.0)
        for one in choices
    ]


def test_an_exchange_that_lowers_the_joint_divergence_is_kept():
    chosen = Allocator(GROUPS).within(5)
    assert names(chosen) == ["small", "large", "large"]
    found = refine(chosen, GROUPS, 5, measure, tries=6, at_once=2)
    assert names(found.choice) == ["large", "small", "large"]
    assert (found.before, found.after, found.taken) == (2.0, 1.0, 1)
    assert found.choice.num_bytes == 5


def test_what_is_no_better_than_chance_is_not_kept():
    generator = torch.Generator().manual_seed(0)
    chosen = Allocator(GROUPS).within(5)

    def noise(choices):
        return [1 + torch.rand(2, 50, generator=generator) for _ in choices]

    assert refine(chosen, GROUPS, 5, noise, tries=6, at_once=3).choice == chosen


def test_nothing_is_measured_without_tries_but_the_choice_itself():
    calls = []
    chosen = Allocator(GROUPS).within(5)
    found = refine(chosen, GROUPS, 5, lambda some: calls.append(len(some)) or measure(some), tries=0, at_once=2)
    assert (calls, found.tried, found.choice) == ([1], 0, chosen)


@pytest.mark.parametrize("room", [4, 5, 6])
def test_exchanges_keep_within_the_bytes(room):
    chosen = Allocator(GROUPS).within(room)
    found = [one.apply(chosen) for one in list_exchanges(chosen, GROUPS, room)]
    assert all(isinstance(one, Choice) and one.num_bytes <= room for one in found)
    assert chosen not in found
    assert len(found) == {4: 2, 5: 2, 6: 0}[room]


def test_no_exchange_takes_a_byte_too_many():
    groups = [[Option("small", 1, 0.5), Option("huge", 4, 0.1)], [Option("small", 1, 0.4), Option("large", 2, 0.1)]]
    chosen = Choice((groups[0][0], groups[1][1]))
    exchanged = Choice((groups[0][1], groups[1][0]))
    assert exchanged.num_bytes == chosen.num_bytes + 2
    for room, expected in ((4, []), (5, [exchanged])):
        assert [one.apply(chosen) for one in list_exchanges(chosen, groups, room)] == expected


def test_a_further_constraint_is_kept():
    chosen = Allocator(GROUPS).within(5)
    found = refine(
        chosen, GROUPS, 5, measure, tries=6, at_once=2, is_allowed=lambda one: one.options[0].name == "small"
    )
    assert found.choice == chosen
