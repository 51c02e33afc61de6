"""A small table as text, with lines around its cells.

It needs no library: reports and plans show themselves wherever kvq runs. `rich` draws the same table in a terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from kvq.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TextTable:
    """Rows of text under a title and a header.

    Attributes:
        title: one line above the table.
        columns: the names of the columns.
        rows: the cells, as many in each row as there are columns.
        right: the columns whose cells are aligned to the right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()

    def draw(self, width: int) -> str:
        """Return the table, at most `width` characters wide: the widest cells are wrapped, never cut."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        widths = fit_widths(widths, width - 3 * len(widths) - 1)
        lines = [
            _rule("┏┳┓", "━", widths),
            *self._draw_row(self.columns, widths, "┃"),
            _rule("┡╇┩", "━", widths),
            *(line for row in self.rows for line in self._draw_row(row, widths, "│")),
            _rule("└┴┘", "─", widths),
        ]
        indent = " " * ((len(lines[0]) - len(self.title)) // 2)
        return "\n".join([indent + self.title, *lines])

    def to_rich(self) -> Table:
        """Return the table as one of rich.

        Raises:
            MissingExtraError: rich is not installed.
        """
        try:
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError as error:
            message = (
                "a table of rich needs the extra `cli`: pip install '.[cli]' in the checkout of kvq; "
                "`str` gives the same table without it"
            )
            raise MissingExtraError(message) from error
        table = Table(title=Text(self.title))
        for column in self.columns:
            table.add_column(column, justify="right" if column in self.right else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _draw_row(self, cells: Sequence[str], widths: Sequence[int], edge: str) -> list[str]:
        wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
        lines = []
        for parts in zip_longest(*wrapped, fillvalue=""):
            aligned = [
                part.rjust(width) if column in self.right else part.ljust(width)
                for part, width, column in zip(parts, widths, self.columns, strict=True)
            ]
            lines.append(f"{edge} {f' {edge} '.join(aligned)} {edge}")
        return lines


def fit_widths(widths: Sequence[int], available: int) -> list[int]:
    """Return widths that have room together: the widest give way first, and none vanishes."""
    fitted = list(widths)
    while sum(fitted) > available and max(fitted) > 1:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _rule(corners: str, line: str, widths: Sequence[int]) -> str:
    left, middle, right = tuple(corners)
    return left + middle.join(line * (width + 2) for width in widths) + right
