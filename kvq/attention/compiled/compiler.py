"""Builds a C file for the machine it runs on, once, and keeps the result on disk.

The file is found again by what it depends on: source, compiler, flags and processor. It must not know what the code
does.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger("kvq")

_COMPILERS = ("cc", "gcc", "clang")
_COMMON_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""Not -ffast-math: linked with it, a library makes the whole process flush denormal numbers."""
_NATIVE_FLAGS = ("-march=native", "-mcpu=native", "")
"""The first that the compiler takes is used; -march on x86, -mcpu on some others."""
_TIMEOUT_SECONDS = 120


class BuildError(Exception):
    """There is no compiler, or it failed; the message says so in one line. Stays within this package."""


def build_library(source: Path) -> Path:
    """Return the shared library made from a C file, from the cache on disk where it is there.

    Raises:
        BuildError: there is no compiler, it fails, or there is no place to write to.
    """
    compiler = find_compiler()
    text = source.read_bytes()
    target = cache_folder() / f"{source.stem}-{_fingerprint(text, compiler)}.so"
    if target.exists():
        return target
    started = time.perf_counter()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / "built.so"
            _compile(compiler, source, built)
            # Renaming is atomic, so that another process sees the whole file or none.
            built.replace(target)
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be kept in {target.parent}: {error}") from error
    _LOG.info("compiled %s in %.1f s; kept as %s", source.name, time.perf_counter() - started, target)
    return target


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: that of `CC`, or the first found.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get("CC"):
        command = tuple(shlex.split(os.environ["CC"]))
        if shutil.which(command[0]):
            return command
        raise BuildError(f"the C compiler {os.environ['CC']!r}, which the variable CC names, is not there")
    for name in _COMPILERS:
        if shutil.which(name):
            return (name,)
    raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)}) on the PATH")


def cache_folder() -> Path:
    """Return the folder of built libraries, below `XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvq" / "kernels"


def _compile(compiler: tuple[str, ...], source: Path, target: Path) -> None:
    message = ""
    for command in _commands(compiler, source, target):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler[0]} did not finish within {_TIMEOUT_SECONDS} s") from error
        if done.returncode == 0:
            return
        message = message or (done.stderr.strip().splitlines() or ["no message"])[0]
    raise BuildError(f"{compiler[0]} failed on {source.name}: {message}")


def _commands(compiler: tuple[str, ...], source: Path, target: Path) -> Iterator[list[str]]:
    for native in _NATIVE_FLAGS:
        flags = [*_COMMON_FLAGS, native] if native else [*_COMMON_FLAGS]
        yield [*compiler, *flags, str(source), "-o", str(target), "-lm"]


def _fingerprint(source: bytes, compiler: tuple[str, ...]) -> str:
    command = [*compiler, "--version"]
    try:
        version = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} cannot be run: {error}") from error
    facts = (shlex.join(compiler), *_COMMON_FLAGS, *_NATIVE_FLAGS, platform.machine(), _processor())
    return hashlib.sha256(source + version + "\0".join(facts).encode()).hexdigest()[:32]


def _processor() -> str:
    """Return what tells processors apart that take different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted}))
