"""The mutations of mutations.yaml, and how one is applied to a tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from definitions import Place, find_places

DATA = Path(__file__).with_name("mutations.yaml")


class MisfitError(ValueError):
    """A mutation that does not fit the code."""


@dataclass(frozen=True)
class Mutation:
    """One piece of the code made wrong.

    Attributes:
        name: what is wrong then.
        breaks: the number of the invariant that it breaks, or the name of a bound.
        where: the qualified name of the function, method, class or constant that is changed, as `Class.method`.
        old: a piece of code that occurs exactly once in the definitions of that name; spaces and line breaks between
            its words and signs do not count.
        new: the code in its place.
        test: the test function or class that must turn red, as pytest names it.
        file: the file, from the root of the tree, where the name and the code alone do not tell it.
    """

    name: str
    breaks: int | str
    where: str
    old: str
    new: str
    test: str
    file: str | None = None

    def find_place(self, root: Path) -> Place:
        """Return the one place of the old code.

        Raises:
            MisfitError: it is nowhere, or there are several.
        """
        places = find_places(root, self.file, self.where, self.old)
        if len(places) != 1:
            raise MisfitError(f"{self.old!r} occurs {len(places)} times in {self.where}")
        return places[0]


def load_mutations() -> list[Mutation]:
    """Return the mutations in the order of the file."""
    return [Mutation(**entry) for entry in yaml.safe_load(DATA.read_text(encoding="utf-8"))]
