"""Show that the tests turn red for each mutation; what `make mutants` runs.

The tree is copied, the tests are shown to be green in the copy, and then each mutation is applied to it in turn. Exit
code 1: the tests are red to begin with, a mutant survived or could not be judged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from judged_tree import JudgedTree, Outcome
from mutations import Mutation, load_mutations
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[2]
WIDTH = 160


class Judges:
    """Copies of the tree that work side by side.

    Args:
        folder: where the copies are made.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.count = count
        self._free: Queue[JudgedTree] = Queue()
        for number in range(count):
            self._free.put(JudgedTree(ROOT, folder / str(number)))

    def each(self, things: Sequence[Any], action: Callable[[JudgedTree, Any], Outcome]) -> Iterator[Outcome]:
        """Yield what the action makes of each thing, in order, with a copy of its own at the time."""

        def act(thing: Any) -> Outcome:
            with self._borrowed() as tree:
                return action(tree, thing)

        with ThreadPoolExecutor(self.count) as pool:
            yield from pool.map(act, things)

    @contextmanager
    def _borrowed(self) -> Iterator[JudgedTree]:
        tree = self._free.get()
        try:
            yield tree
        finally:
            self._free.put(tree)


def check_green(judges: Judges, tests: list[str], console: Console) -> None:
    """Run tests on copies without a mutation; leave with exit code 1 unless they are green."""
    started = time.monotonic()
    shares = [share for share in (tests[start :: judges.count] for start in range(judges.count)) if share]
    for outcome in judges.each(shares, JudgedTree.run):
        if outcome.state != "green":
            console.print(outcome.output, markup=False)
            sys.exit(f"without any mutation: {outcome.state} {outcome.test}")
    console.print(f"{len(tests)} tests green without a mutation, {time.monotonic() - started:.0f} s")


def judge_all(judges: Judges, mutations: list[Mutation], console: Console) -> list[Outcome]:
    """Return what became of each mutant, and show it when it is known."""
    outcomes = []
    for mutation, outcome in zip(mutations, judges.each(mutations, JudgedTree.judge), strict=True):
        outcomes.append(outcome)
        console.print(f"{len(outcomes)}/{len(mutations)} {mutation.name}: {describe(outcome)}", markup=False)
    return outcomes


def describe(outcome: Outcome) -> str:
    """Return the state of a mutant in words."""
    return "SURVIVED" if outcome.state == "green" else outcome.state


def make_table(mutations: list[Mutation], outcomes: list[Outcome]) -> Table:
    """Return one line for each mutant."""
    killed = sum(outcome.state == "red" for outcome in outcomes)
    table = Table(title=f"{killed} of {len(outcomes)} mutants killed")
    for column in ("breaks", "mutation", "in", "state", "killed by", "with", "s"):
        table.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        test = outcome.test.removeprefix("tests/").replace(".py::", ": ")
        cells = (str(mutation.breaks), mutation.name, mutation.where, describe(outcome), test, outcome.error)
        table.add_row(*map(escape, cells), f"{outcome.seconds:.1f}")
    return table


def main() -> int:
    """Try the mutations whose names contain a given text, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[""], help="only mutations whose name contains one of these")
    parser.add_argument("-n", "--workers", type=int, default=2, help="mutants that are tried at once")
    arguments = parser.parse_args()
    mutations = [mutation for mutation in load_mutations() if any(part in mutation.name for part in arguments.parts)]
    if not mutations:
        sys.exit(f"no mutation has any of {arguments.parts} in its name")
    console, started = Console(width=WIDTH), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvq-mutants-") as folder:
        judges = Judges(Path(folder), arguments.workers)
        check_green(judges, sorted({mutation.test for mutation in mutations}), console)
        outcomes = judge_all(judges, mutations, console)
    console.print(make_table(mutations, outcomes))
    console.print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if all(outcome.state == "red" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
