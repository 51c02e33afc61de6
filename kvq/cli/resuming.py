"""How a long command ends on Ctrl-C: in one line, which says where the finished parts lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from kvq.cli.console import print_error


@contextmanager
def told_how_to_resume(parts: Path | None, *, quiet: bool = False) -> Iterator[None]:
    """End the command on Ctrl-C, and say where finished parts lie.

    Args:
        parts: the folder of the finished parts, or None.
        quiet: say nothing, as in all processes of several but one.
    """
    try:
        yield
    except KeyboardInterrupt:
        if parts is not None and not quiet:
            print_error(f"stopped; the same command resumes where this one was (finished parts: {parts})")
        raise typer.Exit(130) from None
