"""`kvq check NAME`: the contract kit from the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.progress import Progress

from kvq.cli.console import get_console, print_error, print_json, print_line, print_table
from kvq.errors import BackendError, CheckNotApplicableError, ConfigError

if TYPE_CHECKING:
    from kvq.testing import BoundCheck, CheckResult

SHOWN_CASES = 3
"""Failing cases of one check that the table shows; the JSON has all."""


def check_backend(name: str, *, only: Sequence[str], options: Sequence[str], as_json: bool) -> None:
    """Run the contract on a backend and print what came of it.

    Args:
        name: of the backend.
        only: names of checks; empty: all.
        options: of the backend, `KEY=VALUE` with a value as in YAML.
        as_json: print JSON rather than a table.

    Raises:
        typer.Exit: code 1 where a check fails, 2 where there is no such backend, check or option.
    """
    checks = _list_checks(name, only, options)
    results = _run(checks)
    failed = [result for result in results if result.outcome == "failed"]
    if as_json:
        print_json({"backend": name, "passed": not failed, "results": [asdict(result) for result in results]})
    else:
        _print_results(name, results)
    if failed:
        raise typer.Exit(1)


def _list_checks(name: str, only: Sequence[str], options: Sequence[str]) -> list[BoundCheck]:
    from kvq.config import KVQCacheConfig
    from kvq.testing import list_checks

    try:
        given = dict(_parse_option(text) for text in options)
        if given:
            KVQCacheConfig(backend_options={name: given})
        return list_checks(name, given, only=only)
    except (BackendError, CheckNotApplicableError, ConfigError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error


def _parse_option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise CheckNotApplicableError(f"--option {text!r} is no KEY=VALUE")
    return key, yaml.safe_load(value)


def _run(checks: list[BoundCheck]) -> list[CheckResult]:
    from kvq.testing import run_checks

    results = []
    # A vendor's library that prints must not end up in the JSON.
    with contextlib.redirect_stdout(sys.stderr), Progress(console=get_console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(checks))
        runs = run_checks(checks)
        for one in checks:
            progress.update(task, description=str(one))
            results.append(next(runs))
            progress.advance(task)
    return results


def _print_results(name: str, results: list[CheckResult]) -> None:
    by_check: dict[str, list[CheckResult]] = {}
    for result in results:
        by_check.setdefault(result.check, []).append(result)
    print_table(("check", "result", "cases", ""), [_row(check, group) for check, group in by_check.items()])
    failed = [result for result in results if result.outcome == "failed"]
    print_line()
    if failed:
        count = len({result.check for result in failed})
        print_line(f"{name} fails {count} of {len(by_check)} checks")
    else:
        print_line(f"{name} keeps the contract: {len(by_check)} checks, {len(results)} runs")


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
