"""Text that every machine has: the source of Python's standard library, split by file.

A file belongs to the same part in every version of Python, since the hash of its path decides. So a model that was
trained on one version's training files has seen none of another version's held-out files, unless a file moved.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

StdlibPart = Literal["train", "calibration", "report"]
"""Training files (nine in ten), files to choose settings on, files to report figures on (one in twenty each)."""
STDLIB_PARTS: tuple[StdlibPart, ...] = get_args(StdlibPart)

_SKIPPED_FOLDERS = {"site-packages", "__pycache__", "dist-packages"}
_SLOTS = 20


def read_stdlib(part: StdlibPart, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield path and text of each file of one part, in the order of the paths' hashes.

    Args:
        part: the part whose files are read.
        root: the library's folder; the running interpreter's unless given.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for name in sorted(_python_files(root), key=_digest):
        if part_of(name) == part:
            try:
                yield name, (root / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the library's tests of source encodings


def part_of(name: str) -> StdlibPart:
    """Return the part that a file, named relative to the library's folder with slashes, belongs to."""
    slot = _digest(name)[0] % _SLOTS
    return "calibration" if slot == 0 else "report" if slot == 1 else "train"


def _python_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS & set(relative.parts):
            yield relative.as_posix()


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
