"""Choosing a setting for each group of layers: the least predicted divergence for every number of bytes.

It is a knapsack in which each group takes exactly one of its options. Dynamic programming over bytes gives the best
choice for every budget at once, and so the whole front. Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems",
2004, chapter 11. It must not know what an option is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_STATES = 1 << 18
"""Budgets that are told apart; where bytes are finer than that, each option's are rounded up to a state."""


@dataclass(frozen=True)
class Option:
    """One choice for a group of layers.

    Attributes:
        name: what is chosen; hashable.
        num_bytes: bytes that the group then holds.
        cost: the divergence that it is predicted to add, in nats.
    """

    name: Any
    num_bytes: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """One option for each group.

    Attributes:
        options: the options, in the order of the groups.
    """

    options: tuple[Option, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all groups."""
        return sum(one.num_bytes for one in self.options)

    @property
    def cost(self) -> float:
        """Predicted divergence: the sum over groups."""
        return math.fsum(one.cost for one in self.options)


class Allocator:
    """The best choices for every budget.

    Args:
        groups: the options of each group, at least one.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        self._groups = [without_dominated(options) for options in groups]
        self.least_bytes = sum(options[0].num_bytes for options in self._groups)
        self.most_bytes = sum(options[-1].num_bytes for options in self._groups)
        self._unit = _find_unit(self._groups, self.most_bytes - self.least_bytes)
        self._costs, self._chosen = self._solve()

    def within(self, num_bytes: int) -> Choice | None:
        """Return the choice with the least predicted divergence in at most so many bytes; None if none fits."""
        if num_bytes < self.least_bytes:
            return None
        return self._trace(min((num_bytes - self.least_bytes) // self._unit, len(self._costs) - 1))

    def reaching(self, cost: float) -> Choice | None:
        """Return the smallest choice with at most that predicted divergence; None if none has."""
        reached = np.flatnonzero(self._costs <= cost)
        return self._trace(int(reached[0])) if len(reached) else None

    def front(self, count: int) -> list[Choice]:
        """Return choices along the whole range, smallest first, evenly spaced in bytes; equal ones count once."""
        states = np.linspace(0, len(self._costs) - 1, count).round().astype(int)
        return list(dict.fromkeys(self._trace(int(state)) for state in states))

    def _solve(self) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int16]]]:
        """Return the least cost of all groups in each state, and the option of each group that leads there."""
        steps = [[self._steps(options, one) for one in options] for options in self._groups]
        states = sum(max(own) for own in steps) + 1
        costs, chosen = np.zeros(states), []
        for options, own in zip(self._groups, steps, strict=True):
            found = np.full((len(options), states), np.inf)
            for row, (option, step) in enumerate(zip(options, own, strict=True)):
                found[row, step:] = costs[: states - step] + option.cost
            chosen.append(found.argmin(axis=0).astype(np.int16))
            costs = found.min(axis=0)
        return costs, chosen

    def _steps(self, options: Sequence[Option], one: Option) -> int:
        """Return how many states an option lies above the smallest one of its group."""
        return -(-(one.num_bytes - options[0].num_bytes) // self._unit)

    def _trace(self, state: int) -> Choice:
        taken: list[Option] = []
        for options, chosen in zip(reversed(self._groups), reversed(self._chosen), strict=True):
            option = options[chosen[state]]
            taken.append(option)
            state -= self._steps(options, option)
        return Choice(tuple(reversed(taken)))


Solve = Callable[[Allocator], Choice | None]
"""Takes the choice that is asked for from the best ones: within a budget, or reaching a divergence."""


def allocate(groups: Sequence[Sequence[Option]], solve: Solve, most_names: int | None = None) -> Choice | None:
    """Return a choice, with at most so many different names among its options.

    Without a limit it is the best one. With one, names are given up one at a time, each time the one whose loss costs
    least, and then each name that is left is exchanged for any other while that helps.

    Args:
        groups: the options of each group.
        solve: what to look for.
        most_names: most different names; None: any number.
    """
    found = solve(Allocator(groups))
    if most_names is None or found is None:
        return found
    names = {one.name for one in found.options}
    while len(names) > most_names:
        tried = [names - {name} for name in sorted(names, key=repr)]
        names = min(tried, key=lambda some: _worth(_solve_with(groups, some, solve)))
    return _exchange(groups, names, solve)


def _exchange(groups: Sequence[Sequence[Option]], names: set[Any], solve: Solve) -> Choice | None:
    every = {one.name for options in groups for one in without_dominated(options)}
    best = _solve_with(groups, names, solve)
    improved = True
    while improved:
        improved = False
        for some in _neighbours(names, every):
            found = _solve_with(groups, some, solve)
            if _worth(found) < _worth(best):
                best, names, improved = found, some, True
                break
    return best


def _neighbours(names: set[Any], every: set[Any]) -> Iterator[set[Any]]:
    for old in sorted(names, key=repr):
        for new in sorted(every - names, key=repr):
            yield names - {old} | {new}


def _solve_with(groups: Sequence[Sequence[Option]], names: set[Any], solve: Solve) -> Choice | None:
    left = [[one for one in options if one.name in names] for options in groups]
    return solve(Allocator(left)) if all(left) else None


def _worth(choice: Choice | None) -> tuple[float, float]:
    return (math.inf, math.inf) if choice is None else (choice.cost, choice.num_bytes)


def without_dominated(options: Sequence[Option]) -> list[Option]:
    """Return the options that no other one beats in bytes and cost at once, smallest first."""
    kept: list[Option] = []
    for one in sorted(options, key=lambda option: (option.num_bytes, option.cost)):
        if not kept or one.cost < kept[-1].cost:
            kept.append(one)
    return kept


def _find_unit(groups: Sequence[Sequence[Option]], span: int) -> int:
    """Return the bytes of one state: the greatest that all differences are multiples of, or more for a wide span."""
    differences = [one.num_bytes - options[0].num_bytes for options in groups for one in options]
    return max(reduce(math.gcd, differences, 0), -(-span // MAX_STATES), 1)
