"""How commands print: tables and lines on stdout, errors on stderr, JSON for programs.

Nothing is cut or wrapped where the output is no terminal, and nothing printed is read as markup: much of it comes from
plugins and from users' files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvq.errors import MAX_MESSAGE_LENGTH, MAX_MESSAGE_LINES, shorten

NO_TERMINAL_WIDTH = 10_000
"""Columns for output that goes to a file or a program: wider than any line."""


def get_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout, or on stderr."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else NO_TERMINAL_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def print_line(text: str = "") -> None:
    """Print one line, which only the terminal itself may wrap."""
    get_console().print(text, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; in a terminal that is too narrow, cells are wrapped, never cut."""
    _print_rich_table(_make_table(columns, rows, show_header=True))


def print_fields(rows: Sequence[tuple[str, object]]) -> None:
    """Print names and what they stand for, in two columns."""
    _print_rich_table(_make_table(("", ""), rows, show_header=False))


def print_json(facts: Any) -> None:
    """Print plain values as JSON, in ASCII."""
    sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")


def print_error(message: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr: one line, and one more for every detail, as many as fit on a screen."""
    _print_labelled("error", "bold red", message)
    lines = [f"  {one_line(detail)}" for detail in details]
    room = MAX_MESSAGE_LENGTH - len(message) - 50  # the label, ends of lines, and what is said of those left out
    shown = 0
    while shown < min(len(lines), MAX_MESSAGE_LINES - 2) and sum(len(line) + 1 for line in lines[: shown + 1]) <= room:
        get_console(stderr=True).print(lines[shown], soft_wrap=True)
        shown += 1
    if shown < len(lines):
        get_console(stderr=True).print(f"  ... {len(lines) - shown:,} more", soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a warning on stderr, as one line."""
    _print_labelled("warning", "bold yellow", message)


def one_line(text: str) -> str:
    """Return a text with every run of white space as one blank."""
    return " ".join(text.split())


def _make_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, show_header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=show_header, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(str(cell))) for cell in row))
    return table


def _print_rich_table(table: Table) -> None:
    console = get_console()
    if console.file.isatty():
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")  # rich fills the last column up with blanks


def _print_labelled(label: str, style: str, message: str) -> None:
    line = Text.assemble((f"{label}: ", style), shorten(one_line(message), MAX_MESSAGE_LENGTH - len(label) - 3))
    get_console(stderr=True).print(line, soft_wrap=True)
