"""Files with known digests: a damaged one is noticed each time before it is read.

A folder is whole if every file in the record that was written last has the size and digest noted there.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

RECORD = "whole.json"
"""The record of a folder's files: for each name its bytes and its SHA-256."""
_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3


def has_digest(path: Path, size_bytes: int, sha256: str) -> bool:
    """Return whether a file is there, as long as expected and with the expected digest."""
    try:
        return path.is_file() and path.stat().st_size == size_bytes and digest_file(path) == sha256
    except OSError:
        return False


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return copy_blocks(file, lambda block: None)  # noqa: ARG005


def copy_blocks(source: IO[bytes], write: Callable[[bytes], Any]) -> str:
    """Hand the blocks of an open file to `write`; return the SHA-256 of all of them, in hexadecimal."""
    digest = hashlib.sha256()
    while block := source.read(_BLOCK_BYTES):
        digest.update(block)
        write(block)
    return digest.hexdigest()


def record_files(folder: Path) -> None:
    """Note size and digest of each file of a folder, which is whole from then on."""
    files = {path.name: [path.stat().st_size, digest_file(path)] for path in sorted(folder.iterdir())}
    (folder / RECORD).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Return whether a folder has a record, and every file is as the record says."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return bool(files) and all(has_digest(folder / name, *facts) for name, facts in files.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def put_in_place(made: Path, target: Path) -> None:
    """Give a whole folder its name, unless another process was faster; a damaged one there makes room.

    Args:
        made: the folder, in the same file system.
        target: its path from now on.

    Raises:
        OSError: the file system refuses.
    """
    for _ in range(_ATTEMPTS):
        with suppress(OSError):
            made.rename(target)
            return
        if is_whole(target):
            return
        with suppress(OSError):
            target.rename(made.with_name(f"damaged-{secrets.token_hex(4)}"))
    made.rename(target)
