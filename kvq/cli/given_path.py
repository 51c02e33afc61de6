"""Paths as they are typed: none is so odd that looking whether it is there raises."""

from __future__ import annotations

from pathlib import Path


def expand(text: str) -> Path:
    """Return a path with `~` worked in; that of a user who does not exist stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; what cannot be the name of one (too long, a NUL) is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
