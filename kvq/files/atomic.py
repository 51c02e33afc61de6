"""Writing a file atomically: a crash leaves the old file or the new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".kvq-unfinished"
"""Ends the name of a file that is still being written, which begins with a dot; a process that is killed leaves it."""


class UnfinishedFile:
    """A file under another name until it is whole.

    Args:
        descriptor: open for writing; owned by whoever made it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data` where the last write ended."""
        left = memoryview(data)
        while len(left):
            left = left[os.write(self._descriptor, left) :]

    def write_at(self, position: int, data: bytes) -> None:
        """Write over `data` from a position that was written before, and go on behind it."""
        os.lseek(self._descriptor, position, os.SEEK_SET)
        self.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[UnfinishedFile]:
    """Replace the file at `path` by the one that the block writes; if the block fails, leave it as it is.

    A symbolic link stays one: the file that it leads to is replaced.

    Raises:
        OSError: the file system refuses, or something else than a file is there: a folder, a pipe, a device.
    """
    target = Path(os.path.realpath(path))
    other = find_other_kind(target)
    if other is not None:
        raise FileExistsError(f"it is {other}, which no file can take the place of; give the path of a file")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            yield UnfinishedFile(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)  # noqa: PTH105  # one call of the system
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def find_other_kind(path: Path) -> str | None:
    """Describe what is at a path if it exists and is not a file, else None; a link counts as its target."""
    if not path.exists() or path.is_file():
        return None
    kinds = {"a folder": Path.is_dir, "a pipe": Path.is_fifo, "a socket": Path.is_socket}
    return next((name for name, is_one in kinds.items() if is_one(path)), "a device")


def _sync_folder(folder: Path) -> None:
    """Make the new name last, where folders can be opened (not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
