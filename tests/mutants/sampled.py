"""Judge the mutants that draw.py drew; the second half of `make mutants-sampled`.

A mutant that no test notices is a hole in the tests, or changes nothing that can be seen: survivors.yaml says which
ones do, and why. Exit code 1: there is a survivor that it does not explain.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from definitions import is_inside
from judged_tree import JudgedTree, Outcome
from rich.console import Console
from run import ROOT, WIDTH, Judges, check_green

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 600
"""For all tests of one mutant; an endless loop is noticed by anybody."""


@dataclass(frozen=True)
class Drawn:
    """A mutant that was drawn.

    Attributes:
        file: where, from the root of the tree.
        line: the number of the first line that it changes.
        operator: what made it, as cosmic-ray names it.
        text: the whole mutated file.
    """

    file: str
    line: int
    operator: str
    text: str

    def change(self) -> tuple[str, str]:
        """Return the lines that differ, before and after, without their indentation."""
        original = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        lines = list(difflib.ndiff(original, self.text.splitlines()))
        return tuple(" ".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in "-+")

    def judge(self, tree: JudgedTree, tests: list[str]) -> Outcome:
        """Put the mutant into a copy of the tree, run tests and restore the copy."""
        path = tree.root / self.file
        original = path.read_text(encoding="utf-8")
        path.write_text(self.text, encoding="utf-8")
        try:
            return tree.run(tests, must_import=path, timeout=TIMEOUT_SECONDS)
        finally:
            path.write_text(original, encoding="utf-8")


def tests_of(file: str) -> list[str]:
    """Return the tests that have to notice a change of a file: those of the longest path that covers it."""
    places = yaml.safe_load((HERE / "tests_by_place.yaml").read_text(encoding="utf-8"))
    return places[max((place for place in places if file.startswith(place)), key=len)]


def find_reason(mutant: Drawn) -> str | None:
    """Return why a survivor may survive, or None."""
    reasons = yaml.safe_load((HERE / "survivors.yaml").read_text(encoding="utf-8"))
    old, new = mutant.change()
    found = (
        entry["why"]
        for entry in reasons
        if entry["old"] in old and entry["new"] in new and is_inside(ROOT / mutant.file, entry["where"], mutant.line)
    )
    return next(found, None)


def describe(outcome: Outcome, reason: str | None) -> str:
    """Return in words what became of a mutant; a crash or an endless loop is noticed by any test."""
    if is_killed(outcome):
        return f"killed by {outcome.test}" if outcome.test else f"killed: {outcome.state}"
    return f"survived: {reason}" if reason else "SURVIVED"


def is_killed(outcome: Outcome) -> bool:
    """Return whether a test has noticed."""
    return outcome.state not in ("green", "its file was not imported")


def main() -> int:
    """Judge the mutants of a file that draw.py wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drawn", type=Path)
    parser.add_argument("-n", "--workers", type=int, default=2, help="mutants that are tried at once")
    arguments = parser.parse_args()
    drawn = [Drawn(**entry) for entry in json.loads(arguments.drawn.read_text(encoding="utf-8"))]
    console, started, holes = Console(width=WIDTH), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="kvq-mutants-") as folder:
        judges = Judges(Path(folder), arguments.workers)
        check_green(judges, sorted({test for mutant in drawn for test in tests_of(mutant.file)}), console)
        outcomes = judges.each(drawn, lambda tree, mutant: mutant.judge(tree, tests_of(mutant.file)))
        for number, (mutant, outcome) in enumerate(zip(drawn, outcomes, strict=True), 1):
            old, new = mutant.change()
            reason = find_reason(mutant)
            verdict = describe(outcome, reason)
            console.print(
                f"{number}/{len(drawn)} {mutant.file}:{mutant.line} {verdict}, {outcome.seconds:.0f} s", markup=False
            )
            if not is_killed(outcome):
                console.print(f"    - {old}\n    + {new}", markup=False)
                holes += [] if reason else [mutant]
    console.print(f"{len(holes)} of {len(drawn)} survived without a reason, {time.monotonic() - started:.0f} s in all")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
