"""How commands print: tables and lines on stdout, errors on stderr, JSON for programs.

Nothing is cut or wrapped unless the output is a terminal, and nothing printed is read as markup: much of it comes from
plugins and from users' files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvq.errors import MAX_MESSAGE_LENGTH, MAX_MESSAGE_LINES, shorten
from kvq.text_table import fit_widths

NO_TERMINAL_WIDTH = 10_000
"""Columns for output that goes to a file or a program: wider than any line."""
COLUMN_GAP = 2
"""Blanks between the columns of a table."""
LEAST_WIDTH = 12
"""Least characters of a growing table's last column."""


def get_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout, or on stderr."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else NO_TERMINAL_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def print_line(text: str = "") -> None:
    """Print one line, which only the terminal itself may wrap."""
    get_console().print(make_printable(text, sys.stdout), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; in a terminal that is too narrow, cells are wrapped, never cut."""
    _print_rich_table(_make_table(columns, rows, show_header=True))


class GrowingTable:
    """A table whose rows are printed as soon as they are known.

    The widths of the columns are chosen in advance; a longer cell is wrapped, never cut. The header is printed at once.

    Args:
        columns: their names.
        widths: characters of the widest cell to come, one for each column; a name may be wider. If the last column has
            none, it takes the width that the others leave.
    """

    def __init__(self, columns: Sequence[str], widths: Sequence[int]) -> None:
        self._columns = columns
        self._widths = [max(pair) for pair in zip(map(len, columns), widths, strict=False)]
        available = get_console().width - COLUMN_GAP * len(columns)  # rich 13 has a gap behind the last one as well
        if len(widths) < len(columns):
            self._widths.append(max(available - sum(self._widths), len(columns[-1]), LEAST_WIDTH))
        self._widths = fit_widths(self._widths, available)
        self._print([], show_header=True)

    def add(self, cells: Sequence[object]) -> None:
        """Print one row."""
        self._print([cells], show_header=False)

    def _print(self, rows: Sequence[Sequence[object]], *, show_header: bool) -> None:
        _print_rich_table(_make_table(self._columns, rows, show_header=show_header, widths=self._widths))


def print_fields(rows: Sequence[tuple[str, object]]) -> None:
    """Print names and their values, in two columns."""
    _print_rich_table(_make_table(("", ""), rows, show_header=False))


def print_json(facts: Any) -> None:
    """Print plain values as JSON, in ASCII."""
    sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")


def print_error(message: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr: one line, and one more for every detail, as many as fit on a screen."""
    _print_labelled("error", "bold red", message)
    lines = [f"  {one_line(detail)}" for detail in details]
    room = MAX_MESSAGE_LENGTH - len(message) - 50  # the label, ends of lines, and the line about those left out
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


def make_printable(text: str, stream: TextIO) -> str:
    """Return a text with characters that the stream cannot encode spelled out: its length is that on the screen."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _make_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, show_header: bool, widths: Sequence[int] | None = None
) -> Table:
    padding = (0, COLUMN_GAP, 0, 0)
    table = Table(box=None, pad_edge=False, padding=padding, show_header=show_header, header_style="bold")
    for column, width in zip(columns, widths or (None,) * len(columns), strict=True):
        table.add_column(column, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(make_printable(one_line(str(cell)), sys.stdout)) for cell in row))
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
    sys.stdout.flush()


def _print_labelled(label: str, style: str, message: str) -> None:
    line = Text.assemble((f"{label}: ", style), shorten(one_line(message), MAX_MESSAGE_LENGTH - len(label) - 3))
    get_console(stderr=True).print(line, soft_wrap=True)
