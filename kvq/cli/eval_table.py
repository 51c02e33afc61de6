"""The table of `kvq eval`, which grows row by row; a terminal that is too narrow gets the columns that say most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvq.cli.console import COLUMN_GAP, GrowingTable, get_console, print_line

if TYPE_CHECKING:
    from kvq.evaluation.quality.record import QualityRecord
    from kvq.evaluation.quality.run import EvaluationPlan

DISPENSABLE = ("median", "99 %", "perplexity", "bits K / V", "99.9 %", "held", "change")
"""Columns that are left out where there is no room, in this order."""


class ShownRun:
    """Prints what is measured, when the run begins; then the table.

    Args:
        plan: the run.
        model: name of the model.
    """

    def __init__(self, plan: EvaluationPlan, model: str) -> None:
        self._plan = plan
        self._model = model
        self._places: list[int] = []
        self._table: GrowingTable | None = None

    def begin(self) -> None:
        """Print what is measured, and how, and what the columns are."""
        from kvq.evaluation.quality.report import LEGEND, describe_plan

        for line in (*describe_plan(self._plan, self._model), *LEGEND):
            print_line(line)

    def add(self, record: QualityRecord) -> None:
        """Print a record; the first one brings the header, and full precision."""
        from kvq.evaluation.quality.report import plain_row, table_row

        if record.failure:
            return
        if self._table is None:
            self._table = self._begin_table()
            self._add(self._table, plain_row(record))
        self._add(self._table, table_row(record))

    def _begin_table(self) -> GrowingTable:
        from kvq.evaluation.quality.report import COLUMNS, column_widths

        widths = column_widths([one.label for one in self._plan.candidates])
        self._places = find_room(COLUMNS, widths, get_console().width)
        left_out = [name for place, name in enumerate(COLUMNS) if place not in self._places]
        if left_out:
            print_line(
                f"the terminal has no room for {', '.join(left_out)}; --out has them, and a wider one shows them"
            )
        return GrowingTable([COLUMNS[place] for place in self._places], [widths[place] for place in self._places])

    def _add(self, table: GrowingTable, cells: Sequence[str]) -> None:
        table.add([cells[place] for place in self._places])


def find_room(columns: Sequence[str], widths: Sequence[int], available: int) -> list[int]:
    """Return the places of the columns that fit, without those of `DISPENSABLE` that have to give way.

    Args:
        columns: their names.
        widths: characters of the widest cell of each.
        available: characters of a line.
    """
    places = list(range(len(columns)))
    for name in DISPENSABLE:
        if sum(max(len(columns[place]), widths[place]) + COLUMN_GAP for place in places) <= available:
            break
        if name in columns:
            places.remove(columns.index(name))
    return places
