"""Tables as text: what rich draws, without rich."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from kvq import KVQ
from kvq.errors import MissingExtraError
from kvq.text_table import TextTable

WORDS = ("one", "word " * 12)


def draw_by_rich(table, width):
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@pytest.mark.parametrize("width", [120, 40])
@pytest.mark.parametrize("title", ["odd", "even", "a title that is longer"])
@pytest.mark.parametrize("rows", [(), (("0", "a b"), ("10-20", "")), (WORDS, WORDS)], ids=["none", "short", "long"])
def test_a_table_is_drawn_as_rich_draws_it(rows, title, width):
    table = TextTable(title, ("layers", "a longer name"), rows, right=frozenset({"layers"}))
    assert table.draw(width) == draw_by_rich(table.to_rich(), width)


def test_nothing_in_a_cell_is_read_as_markup():
    table = TextTable("[bold]t[/]", ("name",), (("[red]x[/red]",),))
    assert "│ [red]x[/red] │" in table.draw(80)
    assert table.draw(80) == draw_by_rich(table.to_rich(), 80)


def test_a_long_word_is_broken_and_not_lost():
    lines = TextTable("", ("name",), (("x" * 50,),)).draw(30).splitlines()
    assert max(map(len, lines)) == 30
    assert "".join(lines).count("x") == 50


def test_the_table_of_rich_names_the_extra_that_it_needs(monkeypatch):
    for name in ("rich", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"needs the extra `cli`: pip install '\.\[cli\]'"):
        KVQ().memory().to_table()
