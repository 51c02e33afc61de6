"""`kvq check NAME`: the contract kit from the command line."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
import yaml

from kvq.cli.console import GrowingTable, print_json, print_line
from kvq.cli.progress import Progress, show_progress
from kvq.cli.usage_errors import print_usage_error
from kvq.errors import BackendError, CheckNotApplicableError, ConfigError

if TYPE_CHECKING:
    from kvq.testing import BoundCheck, CheckResult

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended: 128 and the number of the signal."""
SHOWN_CASES = 3
"""How many failing cases of one check the table shows; the JSON has all."""


def check_backend(
    name: str, *, only: Sequence[str], options: Sequence[str], nbits: Sequence[float], fast: bool, as_json: bool
) -> None:
    """Run the contract on a backend and print the results.

    Args:
        name: the backend's name.
        only: names of checks; empty: all.
        options: the backend's options, each `KEY=VALUE` with a value as in YAML.
        nbits: bits per code to try; empty: all.
        fast: try only the fewest and the most of them.
        as_json: print JSON rather than a table.

    Raises:
        typer.Exit: code 1 if a check fails, 2 if there is no such backend, check, option or number of bits, 130 if the
            run was interrupted.
    """
    with show_progress(f"loading {name}") as progress:
        checks = _list_checks(name, only, options, nbits, fast=fast)
        results = _run(checks, progress, as_table=not as_json)
    failed = [result for result in results if result.outcome == "failed"]
    is_cut = len(results) < len(checks)
    if as_json:
        outcome = {"backend": name, "passed": not (failed or is_cut), "interrupted": is_cut}
        print_json({**outcome, "results": [asdict(result) for result in results]})
    else:
        _print_verdict(name, results, len(checks))
    if is_cut:
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def _list_checks(
    name: str, only: Sequence[str], options: Sequence[str], nbits: Sequence[float], *, fast: bool
) -> list[BoundCheck]:
    from kvq.config import KVQCacheConfig
    from kvq.testing import list_checks

    try:
        given = dict(_parse_option(text) for text in options)
        if given:
            KVQCacheConfig(backend_options={name: given})
        return list_checks(name, given, only=only, nbits=nbits, fast=fast)
    except (BackendError, CheckNotApplicableError, ConfigError) as error:
        print_usage_error(error)
        raise typer.Exit(2) from error


def _parse_option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise CheckNotApplicableError(f"--option {text!r} is not KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise CheckNotApplicableError(f"--option {text!r} has no value that YAML can read: {error}") from error


def _run(checks: list[BoundCheck], progress: Progress, *, as_table: bool) -> list[CheckResult]:
    """Run the checks until they are done or somebody presses Ctrl-C.

    A row is printed as soon as a check has been run on all its cases, and at the end for one that was cut off.
    """
    table = _begin_table(checks) if as_table else None
    progress.begin("", len(checks), "runs")
    results: list[CheckResult] = []
    open_rows = Counter(one.name for one in checks)
    with contextlib.suppress(KeyboardInterrupt):
        for result in _run_quietly(checks, progress):
            results.append(result)
            open_rows[result.check] -= 1
            if table is not None and not open_rows[result.check]:
                table.add(_row(result.check, [one for one in results if one.check == result.check]))
    cut_off = [one for one in results if open_rows[one.check]]
    if table is not None and cut_off:
        table.add(_row(cut_off[0].check, cut_off))
    return results


def _run_quietly(checks: list[BoundCheck], progress: Progress) -> Iterator[CheckResult]:
    """Yield the results; the output of a vendor's library must not end up in the table or the JSON."""
    from kvq.evaluation.one_thread import one_thread
    from kvq.testing import run_checks

    runs = run_checks(checks)
    for one in checks:
        progress.advance(str(one), 0)
        with contextlib.redirect_stdout(sys.stderr), one_thread():
            result = next(runs)
        progress.advance(str(one))
        yield result


def _begin_table(checks: list[BoundCheck]) -> GrowingTable:
    widths = max(len(one.name) for one in checks), len("not applicable"), len(f"{len(checks)}/{len(checks)}")
    return GrowingTable(("check", "result", "cases", ""), widths)


def _print_verdict(name: str, results: list[CheckResult], runs: int) -> None:
    checks = {result.check for result in results}
    failed = {result.check for result in results if result.outcome == "failed"}
    print_line()
    if len(results) < runs:
        print_line(f"{name}: interrupted after {len(results)} of {runs} runs, {len(failed)} checks failed by then")
    elif failed:
        print_line(f"{name} fails {len(failed)} of {len(checks)} checks")
    else:
        print_line(f"{name} keeps the contract: {len(checks)} checks, {len(results)} runs")


def _row(check: str, group: list[CheckResult]) -> tuple[str, str, str, str]:
    failed = [result for result in group if result.outcome == "failed"]
    ran = [result for result in group if result.outcome != "not applicable"]
    if failed:
        reasons = [f"{result.case}: {result.reason}" for result in failed[:SHOWN_CASES]]
        more = [f"and {len(failed) - SHOWN_CASES} more"] if len(failed) > SHOWN_CASES else []
        return check, "failed", f"{len(ran) - len(failed)}/{len(ran)}", "; ".join([*reasons, *more])
    if not ran:
        return check, "not applicable", "-", group[0].reason
    return check, "passed", f"{len(ran)}/{len(ran)}", ""
