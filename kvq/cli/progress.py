"""Progress of long commands, on stderr: a bar in a terminal, a line every few seconds elsewhere.

Owns when and how progress is shown. It must not know the work itself, nor touch stdout, which belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvq.cli.console import get_console, make_printable
from kvq.watcher import Watcher

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_INTERVAL_S = 8.0
"""Seconds between lines: a line every ten, with room for a machine that is busy."""
LINE_LABEL = "progress: "
"""The start of each line, by which a program tells it from warnings and errors."""


class Progress(Watcher, Protocol):
    """How far a command is."""


class ProgressLines:
    """Progress in words, for a file or a program that reads stderr.

    Args:
        label: names the task before the first part begins.
        clock: returns seconds that never go back.
    """

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._begun = clock()
        self._label, self._unit = label, ""
        self._total = self._done = 0
        self._lock = threading.Lock()

    def begin(self, label: str, total: int, unit: str) -> None:
        """See `Progress`."""
        with self._lock:
            self._label, self._total, self._unit, self._done = label, total, unit, 0
            self._begun = self._clock()

    def advance(self, label: str, done: int = 1) -> None:
        """See `Progress`."""
        with self._lock:
            self._label = label
            self._done += done

    def describe(self) -> str:
        """Return the task, the units done, the time since the start, and the time left if it is known."""
        with self._lock:
            now = self._clock()
            parts = [self._label]
            if self._total:
                parts.append(f"{self._done:,} of {self._total:,} {self._unit} done")
            parts.append(f"{format_duration(now - self._started)} elapsed")
            if 0 < self._done < self._total:
                left = (now - self._begun) / self._done * (self._total - self._done)
                parts.append(f"about {format_duration(left)} left")
        return LINE_LABEL + ", ".join(parts)


class ProgressBar:
    """Progress as a bar, for a terminal; it is gone at the end.

    Args:
        label: names the task before the first part begins.
    """

    def __init__(self, label: str) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        count = TaskProgressColumn(), TextColumn("{task.fields[count]}")
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        # rich would send all output to the bar's own stream meanwhile, even if stdout is a file.
        to_terminal = sys.stdout.isatty()
        console = get_console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), *count, *times
        self.shown = RichProgress(*columns, console=console, transient=True, redirect_stdout=to_terminal)
        self._task: TaskID = self.shown.add_task(label, total=None, count="")
        self._unit = ""

    def begin(self, label: str, total: int, unit: str) -> None:
        """See `Progress`."""
        self._unit = unit
        self.shown.reset(self._task, description=label, total=total, count=f"of {total:,} {unit}")

    def advance(self, label: str, done: int = 1) -> None:
        """See `Progress`."""
        self.shown.update(self._task, description=label, advance=done)


@contextmanager
def show_progress(label: str, *, hidden: bool = False) -> Iterator[Progress]:
    """Show on stderr how far the block is.

    Args:
        label: names the task before the first part begins.
        hidden: show nothing, as in all processes of several but one.
    """
    if not hidden and sys.stderr.isatty():
        bar = ProgressBar(label)
        with bar.shown:
            yield bar
        return
    lines = ProgressLines(label)
    stop = threading.Event()
    stream = sys.stderr

    def tell() -> None:
        stream.write(make_printable(lines.describe(), stream) + "\n")
        stream.flush()

    teller = threading.Thread(target=tell_until, args=(lambda: stop.wait(LINE_INTERVAL_S), tell), daemon=True)
    if not hidden:
        teller.start()
    try:
        yield lines
    finally:
        stop.set()
        if not hidden:
            teller.join()


def tell_until(wait: Callable[[], bool], tell: Callable[[], None]) -> None:
    """Call `tell` after each `wait` that returns False; end quietly if nobody reads any more.

    Args:
        wait: lets an interval pass; returns True once the work is over.
        tell: writes one line.
    """
    while not wait():
        try:
            tell()
        except (OSError, ValueError):  # the reader has closed the pipe, or the stream is closed
            return


def format_duration(seconds: float) -> str:
    """Return minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
