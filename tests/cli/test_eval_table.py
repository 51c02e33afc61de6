"""What a narrow terminal shows of the table of `kvq eval`."""

from __future__ import annotations

from kvq.cli.eval_table import find_room
from kvq.evaluation.quality.report import COLUMNS, column_widths

WIDTHS = column_widths(["k4v4"])


def test_a_wide_line_has_every_column():
    assert [COLUMNS[place] for place in find_room(COLUMNS, WIDTHS, 200)] == list(COLUMNS)


def test_a_line_of_80_characters_has_what_says_most_and_no_more_than_fits():
    shown = find_room(COLUMNS, WIDTHS, 80)
    assert sum(WIDTHS[place] + 2 for place in shown) <= 80
    assert {"cache", "KL (95 %)", "top-1", "smaller"} <= {COLUMNS[place] for place in shown} < set(COLUMNS)


def test_one_character_too_few_costs_one_column():
    columns, widths = ("cache", "median", "99 %"), (5, 9, 9)
    assert find_room(columns, widths, 7 + 11 + 11) == [0, 1, 2]
    assert find_room(columns, widths, 7 + 11 + 10) == [0, 2]
    assert find_room(("cache", "held"), (5, 90), 20) == [0]
