"""Paths as they are typed: checking whether one exists never raises, however odd it is; and finding a configuration."""

from __future__ import annotations

from pathlib import Path

import typer

from kvq.cli.console import print_error

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def expand(text: str) -> Path:
    """Return a path with `~` expanded; the `~` of a user who does not exist stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; False for a text that can name none (too long, a NUL)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_config_file(text: str | Path) -> Path:
    """Return the path of a configuration file that exists.

    Raises:
        typer.Exit: code 2, there is none; the error is printed.
    """
    path = expand(str(text))
    if exists(path) and str(text) and not path.is_dir():
        return path
    if str(text) and exists(path):
        problem = "is a directory; give a configuration file in it"
    elif path.suffix.lower() in CONFIG_SUFFIXES:
        problem = "does not exist; give the path of a configuration file"
    else:
        problem = f"is not a file; give the path of a configuration file ({', '.join(CONFIG_SUFFIXES)})"
    print_error(f"{str(text)!r} {problem}")
    raise typer.Exit(2)
