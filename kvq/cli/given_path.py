"""Paths as they are typed: checking whether one exists never raises, however odd it is."""

from __future__ import annotations

from pathlib import Path


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
