"""Exchanging settings between groups of layers, judged by the divergence of the whole cache.

An allocation believes that single effects add up. Where two choices are nearly equal by that sum, the joint effect
decides: pairs of groups are tried in which one gets more bytes and another one fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from kvq.tuning.allocation import Choice, Option, without_dominated

Measure = Callable[[Sequence[Choice]], list[torch.Tensor]]
"""Returns the divergence of each token, `[N, S]`, under each choice."""


@dataclass(frozen=True)
class Exchange:
    """A change of two groups, or of one.

    Attributes:
        changes: the new option of each group, by the group's place.
        cost: by how much the predicted divergence grows.
    """

    changes: tuple[tuple[int, Option], ...]
    cost: float

    def apply(self, choice: Choice) -> Choice:
        """Return the choice with the changes."""
        options = list(choice.options)
        for place, option in self.changes:
            options[place] = option
        return Choice(tuple(options))


@dataclass(frozen=True)
class Refined:
    """A choice after exchanges.

    Attributes:
        choice: the choice.
        before: mean divergence of the choice that it began with, in nats.
        after: mean divergence of the choice.
        tried: number of choices that were measured.
        taken: number of exchanges that were kept.
    """

    choice: Choice
    before: float
    after: float
    tried: int
    taken: int


def refine(
    choice: Choice,
    groups: Sequence[Sequence[Option]],
    most_bytes: int,
    measure: Measure,
    *,
    tries: int,
    at_once: int,
    is_allowed: Callable[[Choice], bool] = lambda _: True,
) -> Refined:
    """Try exchanges, those first that are predicted to cost least, and keep what lowers the joint divergence.

    Args:
        choice: what to begin with.
        groups: all options of each group.
        most_bytes: bytes that no choice may exceed.
        measure: measures whole choices.
        tries: most choices to measure.
        at_once: choices of one batch.
        is_allowed: whether a choice keeps to further constraints.
    """
    current = measure([choice])[0]
    before, tried, taken = float(current.mean()), 0, 0
    seen = {choice}
    while tried < tries:
        batch = _next_choices(choice, groups, most_bytes, seen, is_allowed, min(at_once, tries - tried))
        if not batch:
            break
        seen |= set(batch)
        tried += len(batch)
        measured = measure(batch)
        best = min(range(len(batch)), key=lambda place: float(measured[place].mean()))
        if _is_better(measured[best], current):
            choice, current, taken = batch[best], measured[best], taken + 1
    return Refined(choice, before, float(current.mean()), tried, taken)


def _next_choices(
    choice: Choice,
    groups: Sequence[Sequence[Option]],
    most_bytes: int,
    seen: set[Choice],
    is_allowed: Callable[[Choice], bool],
    count: int,
) -> list[Choice]:
    found: list[Choice] = []
    for exchange in sorted(list_exchanges(choice, groups, most_bytes), key=lambda one: one.cost):
        changed = exchange.apply(choice)
        if changed not in seen and is_allowed(changed):
            found.append(changed)
        if len(found) == count:
            break
    return found


def list_exchanges(choice: Choice, groups: Sequence[Sequence[Option]], most_bytes: int) -> Iterator[Exchange]:
    """Yield the changes of one or two groups that keep within a number of bytes."""
    room = most_bytes - choice.num_bytes
    single = [
        (place, option, option.num_bytes - old.num_bytes, option.cost - old.cost)
        for place, (old, options) in enumerate(zip(choice.options, groups, strict=True))
        for option in without_dominated(options)
        if option != old
    ]
    for place, option, more, cost in single:
        if more <= room and more >= 0:
            yield Exchange(((place, option),), cost)
    for one, other in combinations(single, 2):
        is_exchange = one[0] != other[0] and (one[2] < 0) != (other[2] < 0)
        if is_exchange and one[2] + other[2] <= room:
            yield Exchange(((one[0], one[1]), (other[0], other[1])), one[3] + other[3])


def _is_better(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether divergences are lower by more than their spread: twice the standard error of the difference."""
    difference = (ours - theirs).double().flatten()
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) < -2 * error
