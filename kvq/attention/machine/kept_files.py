"""Files that kvq keeps from process to process: where they lie, who may write there, and how one is written.

Code is loaded from these folders: one that others may write to is refused. Every file can be lost without harm: it is
made again. It must not know what the files hold.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from kvq.attention.machine.variables import read_variable

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_UNFINISHED = ".unfinished"
_STALE_SECONDS = 3600


def open_private_folder(name: str) -> Path:
    """Return the folder `name` below kvq's cache folder, made if need be, into which nobody else can write.

    It lies below `XDG_CACHE_HOME`, where that is set to an absolute path, or `~/.cache`. One of ours that others may
    write to is closed to them; files that they put there before are not ours, and never read.

    Raises:
        OSError: there is no such folder and none can be made, or others may write to it; the message says which.
    """
    given = Path(read_variable("XDG_CACHE_HOME") or "")
    base = given if given.is_absolute() else _find_home() / ".cache"
    for folder in (base / "kvq", base / "kvq" / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if not is_ours(facts) and _is_owned(facts):
            folder.chmod(stat.S_IMODE(facts.st_mode) & ~_OTHERS_WRITE)
        if not is_ours(folder.stat()):
            raise PermissionError(f"{folder} belongs to another user, or others may write to it")
    if base.stat().st_mode & stat.S_IWOTH and not base.stat().st_mode & stat.S_ISVTX:
        raise PermissionError(f"everybody may write to {base}, and so put another folder in the place of {folder}")
    return folder


def is_ours(facts: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and nobody else may write to it."""
    return _is_owned(facts) and not (hasattr(os, "geteuid") and facts.st_mode & _OTHERS_WRITE)


def read_private_file(path: Path, limit_bytes: int) -> bytes | None:
    """Return the bytes of a file of ours.

    None where it is not there, not a plain file, longer than the limit, or others may write to it.
    """
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or not is_ours(facts) or facts.st_size > limit_bytes:
            return None
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError:
        return None
    return data if len(data) <= limit_bytes else None  # it may have grown meanwhile


def remove_file(path: Path) -> None:
    """Delete a file, if it is there and can be deleted."""
    with suppress(OSError):
        path.unlink()


def keep_file(target: Path, data: bytes) -> None:
    """Write a file atomically: even a power failure leaves the old file or the new one, whole.

    Raises:
        OSError: the file system refuses; nothing is left behind.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123  # of a descriptor
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete the unfinished files of processes that were killed."""
    with suppress(OSError):
        for path in folder.glob(f".*{_UNFINISHED}"):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _is_owned(facts: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()  # Windows: a user's folders are the user's own


def _find_home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home folder, and XDG_CACHE_HOME is not set: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Make a new name last, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
