"""Files that a command writes at its end: a path that cannot be written is refused before minutes of measuring.

Owns the checks of their paths, and writing them. It must not know their content.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import typer

from kvq.cli.console import print_error
from kvq.errors import EvaluationError
from kvq.evaluation.matplotlib_figure import MATPLOTLIB_IS_MISSING

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def check_outputs(out: Path | None, picture: Path | None) -> None:
    """Check that the files asked for can be written.

    Args:
        out: path of a JSON file, or None.
        picture: path of a picture, or None.

    Raises:
        EvaluationError: a path is a folder, or its folder is missing or not writable; or no such picture can be drawn.
    """
    for file in (out, picture):
        problem = None if file is None else _find_problem(file)
        if problem is not None:
            raise EvaluationError(f"{str(file)!r} cannot be written: {problem}")
    if picture is None:
        return
    if out is not None and out.absolute() == picture.absolute():
        raise EvaluationError(f"--out and --picture are the same file, {str(out)!r}")
    if picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise EvaluationError(f"{str(picture)!r} is not a picture file: use .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise EvaluationError(MATPLOTLIB_IS_MISSING)


def write_output(path: Path, text: str) -> None:
    """Write a file; if the disk is full by now, or the folder is gone, end the command with exit code 1."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print_error(f"{str(path)!r} cannot be written: {error.strerror or error}")
        raise typer.Exit(1) from error


def _find_problem(file: Path) -> str | None:
    folder = file.absolute().parent
    try:
        if file.is_dir():
            return "it is a folder; give a file in it"
        if not folder.is_dir():
            return f"there is no folder {str(folder)!r}; make it first"
        if not os.access(file if file.exists() else folder, os.W_OK):
            return "permission is denied"
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero in it
        return getattr(error, "strerror", None) or str(error)
    return None
