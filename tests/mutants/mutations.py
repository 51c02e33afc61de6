"""The mutations of mutations.yaml, and how one is applied to a tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

DATA = Path(__file__).with_name("mutations.yaml")


@dataclass(frozen=True)
class Mutation:
    """One line of the code made wrong.

    Attributes:
        name: what is wrong then.
        breaks: the number of the invariant that it breaks, or the name of a bound.
        file: where, from the root of the tree.
        old: a line that occurs exactly once in the file, without its indentation.
        new: what stands there instead, likewise.
        test: the test function or class that must turn red, as pytest names it.
    """

    name: str
    breaks: int | str
    file: str
    old: str
    new: str
    test: str

    def count_in(self, root: Path) -> int:
        """Return how often the old line occurs."""
        return [line.strip() for line in self._lines(root)].count(self.old)

    def mutated(self, root: Path) -> str:
        """Return the text of the file with the new line in the place of the old one."""
        lines = self._lines(root)
        return "".join(line.replace(self.old, self.new) if line.strip() == self.old else line for line in lines)

    def _lines(self, root: Path) -> list[str]:
        return (root / self.file).read_text(encoding="utf-8").splitlines(keepends=True)


def load_mutations() -> list[Mutation]:
    """Return the mutations in the order of the file."""
    return [Mutation(**entry) for entry in yaml.safe_load(DATA.read_text(encoding="utf-8"))]
