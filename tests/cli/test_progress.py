"""Progress where there is no terminal: lines on stderr, counted by a clock that the test turns."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from kvq.cli import progress
from kvq.cli.console import GrowingTable
from kvq.cli.progress import LINE_INTERVAL_S, ProgressLines, format_duration, tell_until
from kvq.text_table import fit_widths


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_line_says_what_runs_how_much_is_done_and_what_is_left():
    clock = Clock()
    lines = ProgressLines("loading the model", clock)
    clock.now += 8
    assert lines.describe() == "progress: loading the model, 0:08 elapsed"
    lines.begin("full precision", 16, "caches")
    clock.now += 2
    assert lines.describe() == "progress: full precision, 0 of 16 caches done, 0:10 elapsed"
    lines.advance("hqq K4V2", 4)
    clock.now += 28  # 4 of 16 in 30 seconds, which loading is no part of: 90 more for the other 12
    assert lines.describe() == "progress: hqq K4V2, 4 of 16 caches done, 0:38 elapsed, about 1:30 left"
    lines.advance("done", 12)
    assert lines.describe() == "progress: done, 16 of 16 caches done, 0:38 elapsed"
    lines.begin("filling", 100_000, "tokens")
    assert lines.describe() == "progress: filling, 0 of 100,000 tokens done, 0:38 elapsed"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert format_duration(seconds) == text


def test_lines_come_at_least_every_ten_seconds_until_the_work_is_over():
    clock, told = Clock(), []

    def wait():
        clock.now += LINE_INTERVAL_S
        return clock.now > 100 + 65  # after 65 seconds of work

    tell_until(wait, lambda: told.append(clock.now))
    assert len(told) == 8
    assert all(later - earlier <= 10 for earlier, later in zip([100.0, *told], told, strict=False))


def test_a_reader_that_is_gone_ends_the_lines_and_nothing_else():
    waits = iter([False, False, True])

    def tell():
        raise BrokenPipeError

    tell_until(lambda: next(waits), tell)
    assert next(waits) is False  # it did not go on


@pytest.fixture
def impatient(monkeypatch):
    """Let a line be due a thousand times a second."""
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 1e-3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "args",
    [
        ("check", "native", "--only", "check_accuracy", "--json"),
        ("check", "native", "--only", "check_accuracy"),
        ("check", "good.yaml"),
        ("demo", "-b", "native", "--contexts", "1", "--questions", "1", "--records", "16"),
        ("eval", "--dataset", "recall-report", "--sequences", "1", "--length", "200", "--step", "64", "--needles", "0"),
        ("bench", "--quick", "--length", "128", "--rounds", "3", "--flushes", "0", "--backend", "native", "--no-peers"),
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_every_long_command_tells_its_progress_on_stderr_alone(call_kvq, tmp_path, args):
    (tmp_path / "good.yaml").write_text("nbits_v: 4")
    extra = ("--no-peers",) if args[0] == "eval" else ()
    done = call_kvq(*args, *extra, keep_progress=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("progress: ")]
    assert lines
    assert all(re.search(r", \d+:\d\d elapsed", line) for line in lines)
    assert "progress" not in done.stdout
    if "--json" in args:
        assert json.loads(done.stdout)["passed"] is True


@pytest.mark.usefixtures("impatient")
def test_a_process_that_does_not_print_tells_nothing(capsys):
    with progress.show_progress("working", hidden=True) as shown:
        shown.begin("working", 3, "parts")
        shown.advance("working")
    assert capsys.readouterr().err == ""


def test_a_label_that_the_encoding_lacks_is_spelled_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 1e-3)
    with progress.show_progress("größe"):
        while not stream.buffer.getvalue():
            stream.flush()
    assert stream.buffer.getvalue().decode("ascii").startswith(r"progress: gr\xf6\xdfe, 0:00 elapsed")


IN_A_TERMINAL = """
import sys, time
from kvq.cli.console import GrowingTable
from kvq.cli.progress import show_progress
with show_progress("working") as progress:
    progress.begin("first", 2, "parts")
    table = GrowingTable(("part", "result"), (8, 6))
    for part in ("one", "two"):
        table.add((part, "right"))
        progress.advance(part)
"""


def test_rows_go_to_the_file_though_the_bar_is_in_a_terminal():
    ours, theirs = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", IN_A_TERMINAL], stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert process.stdout.splitlines() == ["part      result", "one       right", "two       right"]
    assert "working" in shown or "first" in shown
    assert "right" not in shown


def test_rows_of_a_growing_table_are_aligned_in_any_width(monkeypatch, capsys):
    table = GrowingTable(("name", "share", ""), (14, 6))
    for row in (("full precision", "100.0%", ""), ("a", "3%", "a reason ± 1")):
        table.add(row)
    assert capsys.readouterr().out.splitlines() == [
        "name            share",
        "full precision  100.0%",
        "a               3%      a reason ± 1",
    ]


class Terminal(io.StringIO):
    """A terminal, as far as rich asks."""

    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_narrow_terminal_wraps_cells_and_loses_none(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    for name, value in {"COLUMNS": "40", "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    columns = ("backend", "bits", "exact answers", "same tokens", "smaller")
    table = GrowingTable(columns, (14, 6, 6, 6, 6))
    rows = [("full precision", "16 bit", "100.0%", "99.9%", "1.00x"), ("native", "K4V2", "98.8%", "7.5%", "2.82x")]
    for row in rows:
        table.add(row)
    lines = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()  # without what is bold
    assert max(map(len, lines)) <= 40
    shown = sorted("".join(lines).replace(" ", ""))
    assert shown == sorted("".join(map("".join, [columns, *rows])).replace(" ", ""))
    starts = [line.index(cell) for line in lines for cell in ("1.00x", "2.82x") if cell in line]
    assert len(starts) == 2
    assert starts[0] == starts[1]


@pytest.mark.parametrize(
    ("widths", "available", "fitted"),
    [((14, 6, 13), 40, [14, 6, 13]), ((14, 6, 13), 26, [10, 6, 10]), ((14, 6, 13), 9, [3, 3, 3]), ((5, 5), 0, [1, 1])],
)
def test_the_widest_columns_give_way_and_none_vanishes(widths, available, fitted):
    assert fit_widths(widths, available) == fitted
