"""A copy of the tree in which mutants are judged; the tree itself is never written to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mutations import MisfitError, Mutation

HERE = Path(__file__).parent
COPIED = ("kvq", "kvq_backends", "plugins", "benchmarks", "tests", "docs", "examples", "pyproject.toml", "README.md")
TIMEOUT_SECONDS = 300
"""For the test of one mutant, and for each test that is shown to be green."""
PASSED, FAILED = 0, 1
CRASHES = {"NameError", "ImportError", "SyntaxError"}
"""Errors of code that cannot run at all: a test that meets them has noticed nothing."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        state: `green`, `red`, or why the run shows nothing.
        seconds: how long it took.
        test: the first test that failed.
        error: the class of its error.
        output: what pytest printed.
    """

    state: str
    seconds: float = 0.0
    test: str = ""
    error: str = ""
    output: str = ""


class JudgedTree:
    """A copy of what the tests need.

    Args:
        source: the root of the tree.
        root: where the copy is made.
    """

    def __init__(self, source: Path, root: Path) -> None:
        self.root = root.resolve()
        for name in COPIED:
            if (source / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".hypothesis")
                shutil.copytree(source / name, self.root / name, ignore=ignored)
            else:
                shutil.copy(source / name, self.root / name)

    def judge(self, mutation: Mutation) -> Outcome:
        """Apply a mutation, run its test and restore the copy."""
        try:
            place = mutation.find_place(self.root)
        except MisfitError as misfit:
            return Outcome(str(misfit))
        original, mutated = place.path.read_text(encoding="utf-8"), place.replaced(mutation.new)
        place.path.write_text(mutated, encoding="utf-8")
        try:
            return self.run([mutation.test], must_import=place.path)
        finally:
            place.path.write_text(original, encoding="utf-8")

    def run(self, tests: list[str], must_import: Path | None = None, timeout: float | None = None) -> Outcome:
        """Run tests until one fails; the copy's code comes before what is installed.

        Args:
            tests: as pytest names them.
            must_import: the file that makes the difference; the run shows nothing if it was not imported.
            timeout: seconds that the run may take; None: those of one test for each.
        """
        verdict = self.root / "verdict.json"
        verdict.unlink(missing_ok=True)
        started = time.monotonic()
        try:
            process = self._start_pytest(tests, verdict, timeout or TIMEOUT_SECONDS * len(tests))
        except subprocess.TimeoutExpired:
            return Outcome("ran out of time", time.monotonic() - started)
        seconds = time.monotonic() - started
        if process.returncode not in (PASSED, FAILED) or not verdict.exists():
            return Outcome(f"pytest exited with {process.returncode}", seconds, output=process.stdout + process.stderr)
        return self._read(json.loads(verdict.read_text()), must_import, seconds, process.stdout)

    def _read(self, verdict: dict, must_import: Path | None, seconds: float, output: str) -> Outcome:
        strangers = [path for path in verdict["modules"] if not Path(path).is_relative_to(self.root)]
        if strangers:
            return Outcome(f"{strangers[0]} was tested", seconds)
        if must_import and str(must_import) not in verdict["modules"]:
            state = "cannot be imported" if verdict["failures"] else "its file was not imported"
            return Outcome(state, seconds)
        if not verdict["failures"]:
            return Outcome("green", seconds)
        first = verdict["failures"][0]
        state = "cannot run" if CRASHES & set(first["error"]) else "red"
        return Outcome(state, seconds, first["test"], first["error"][0], output)

    def _start_pytest(self, tests: list[str], verdict: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), str(HERE)]),
            # A mutated file may have the size and the second of the original: its bytecode must not be taken for it.
            "PYTHONDONTWRITEBYTECODE": "1",
            "KVQ_EXAMPLES": "first_failure",
            "KVQ_VERDICT": str(verdict),
            "OMP_NUM_THREADS": "1",
        }
        options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "verdict_plugin"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
