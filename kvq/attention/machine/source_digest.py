"""The digest of source files: a verdict on one version of a kernel does not count for another."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def digest_files(folder: Path, pattern: str, extra: str = "") -> str:
    """Return a digest of the files in a folder whose names fit a pattern, and of `extra`; read once in a process."""
    digest = hashlib.sha256(extra.encode())
    for path in sorted(folder.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]
