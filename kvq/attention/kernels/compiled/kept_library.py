"""Built libraries on disk: built once, found again, and never loaded unless they are whole.

The name of a file holds a digest of what it depends on and one of its bytes. So a file that was cut off, overwritten or
put there by another program is found out before it is loaded: loading it would kill the process.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvq.attention.kernels.compiled.compiler import BuildError, Toolchain, find_toolchain
from kvq.attention.machine.kept_files import keep_file, open_private_folder, read_private_file, remove_unfinished

Loaded = TypeVar("Loaded")
_LOG = logging.getLogger("kvq")
_FOLDER = "kernels"
_DIGITS = 32
_LIMIT_BYTES = 64 << 20
"""The longest file that is read: our libraries take some hundred kilobytes."""


@dataclass(frozen=True)
class BuiltLibrary:
    """A shared library that is whole.

    Attributes:
        path: where it lies.
        digest: digest of its bytes.
        is_new: whether it was built just now.
        scratch: the folder that holds it for this process only, or None where it is kept.
    """

    path: Path
    digest: str
    is_new: bool
    scratch: Path | None = None

    def discard(self) -> None:
        """Delete it; the next one is built again."""
        with suppress(OSError):
            self.path.unlink()

    def release(self) -> None:
        """Delete the temporary folder; call it once the library is loaded, or will not be loaded."""
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def provide_library(source: Path) -> BuiltLibrary:
    """Return the shared library made from a C file: the one that is kept, or a new one.

    Where nothing can be kept, it is built for this process alone, in a private temporary folder.

    Raises:
        BuildError: there is no compiler, it fails, or there is no place to write to.
    """
    toolchain, text = find_toolchain(), _read(source)
    stem = f"{source.stem}-{toolchain.fingerprint(text)}"
    try:
        folder = open_private_folder(_FOLDER)
    except OSError as error:
        return _build_for_this_process(toolchain, source, stem, error)
    return _find_kept(folder, stem) or _build_and_keep(toolchain, source, stem, folder)


def load_library(source: Path, open_built: Callable[[BuiltLibrary], Loaded]) -> Loaded:
    """Return what a function makes of the library of a C file; a kept one that it refuses is built once more.

    Args:
        source: the C file.
        open_built: opens a library; it raises `BuildError` where that is not the one that was to be built.

    Raises:
        BuildError: the library cannot be built, or a new one is refused.
    """
    built = provide_library(source)
    try:
        return open_built(built)
    except BuildError:
        if built.is_new:
            raise
        built.discard()
    return open_built(provide_library(source))


def _find_kept(folder: Path, stem: str) -> BuiltLibrary | None:
    for path in sorted(folder.glob(f"{stem}-*.so")):
        digest, data = path.stem.removeprefix(f"{stem}-"), read_private_file(path, _LIMIT_BYTES)
        if data is not None and _digest(data) == digest:
            return BuiltLibrary(path, digest, is_new=False)
        _LOG.info("%s is damaged or not ours; it is built again", path)
        with suppress(OSError):
            path.unlink()
    return None


def _build_and_keep(toolchain: Toolchain, source: Path, stem: str, folder: Path) -> BuiltLibrary:
    data = _build(toolchain, source)
    digest = _digest(data)
    target = folder / f"{stem}-{digest}.so"
    try:
        keep_file(target, data)
        remove_unfinished(folder)
    except OSError as error:
        return _hold_for_this_process(data, stem, error)
    _LOG.info("kept as %s", target)
    return BuiltLibrary(target, digest, is_new=True)


def _build_for_this_process(toolchain: Toolchain, source: Path, stem: str, reason: OSError) -> BuiltLibrary:
    return _hold_for_this_process(_build(toolchain, source), stem, reason)


def _hold_for_this_process(data: bytes, stem: str, reason: OSError) -> BuiltLibrary:
    digest = _digest(data)
    try:
        scratch = Path(tempfile.mkdtemp(prefix="kvq-"))
        path = scratch / f"{stem}-{digest}.so"
        keep_file(path, data)
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be kept: {reason}; nor in a temporary folder: {error}") from error
    _LOG.warning("the compiled kernel is built again in every process, since it cannot be kept: %s", reason)
    return BuiltLibrary(path, digest, is_new=True, scratch=scratch)


def _build(toolchain: Toolchain, source: Path) -> bytes:
    """Return the library that a compiler makes of a C file; built apart, where nobody sees half of it."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="kvq-") as folder:
            built = Path(folder) / "built.so"
            toolchain.compile(source, built)
            data = built.read_bytes()
    except OSError as error:
        raise BuildError(f"there is no place to build the compiled kernel in: {error}") from error
    _LOG.info("compiled %s in %.1f s", source.name, time.perf_counter() - started)
    return data


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise BuildError(f"{source} cannot be read: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
