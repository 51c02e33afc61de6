"""Find the C compiler and its flags, call it, and check its library.

It must not know what the code does, nor where libraries are kept.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvq.attention.machine.processor import describe_processor
from kvq.attention.machine.variables import COMPILER_VARIABLES, FLAGS_VARIABLE, read_variable

_COMPILERS = ("cc", "gcc", "clang")
_COMMON_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""Not -ffast-math: linked with it, a library makes the whole process flush denormal numbers."""
_NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
"""The first that the compiler takes are used; -march on x86, -mcpu on some others."""
_TIMEOUT_SECONDS = 120
_VERSION_TIMEOUT_SECONDS = 10
_LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"


class BuildError(Exception):
    """The library is unavailable; the message says why, in one line. Stays within this package."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler and the flags that fit the processor.

    Attributes:
        command: the compiler, with the arguments that the user gave with it.
        flags: sets of flags for the processor; the first that the compiler takes is used.
    """

    command: tuple[str, ...]
    flags: tuple[tuple[str, ...], ...] = _NATIVE_FLAGS

    def fingerprint(self, source: bytes) -> str:
        """Return a digest of all that the library made from a source depends on, 32 hexadecimal digits.

        Raises:
            BuildError: the compiler cannot be run.
        """
        version = _run((*self.command, "--version"), _VERSION_TIMEOUT_SECONDS).stdout
        flags = [" ".join(one) for one in self.flags]
        facts = (shlex.join(self.command), *_COMMON_FLAGS, *flags, platform.machine(), describe_processor())
        return hashlib.sha256(source + version + "\0".join(facts).encode()).hexdigest()[:32]

    def compile(self, source: Path, target: Path) -> None:
        """Make a shared library of a C file.

        Raises:
            BuildError: the compiler fails, with its first line, or it wrote no library.
        """
        message = ""
        for command in self._commands(source, target):
            done = _run(command, _TIMEOUT_SECONDS)
            if done.returncode == 0:
                return _check_library(target, self.command[0])
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            message = message or (lines or ["no message"])[0]
        raise BuildError(f"{self.command[0]} failed on {source.name}: {message}")

    def _commands(self, source: Path, target: Path) -> Iterator[tuple[str, ...]]:
        for flags in self.flags:
            yield (*self.command, *_COMMON_FLAGS, *flags, str(source), "-o", str(target), "-lm")


def find_toolchain() -> Toolchain:
    """Return the compiler that `KVQ_CC` or `CC` names, or the first found, with the flags of `KVQ_KERNEL_CFLAGS`.

    Raises:
        BuildError: there is none, or a variable cannot be read.
    """
    flags = read_variable(FLAGS_VARIABLE)
    chosen = _NATIVE_FLAGS if flags is None else (_split(FLAGS_VARIABLE, flags),)
    for variable in COMPILER_VARIABLES:
        text = read_variable(variable)
        if text is not None:
            command = _split(variable, text)
            if command[0] and shutil.which(command[0]):
                return Toolchain(command, chosen)
            raise BuildError(f"the C compiler {text!r}, which the variable {variable} names, is not there")
    for name in _COMPILERS:
        if shutil.which(name):
            return Toolchain((name,), chosen)
    raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)}) on the PATH")


def _split(variable: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise BuildError(f"the variable {variable} is {text!r}, which is not a command: {error}") from error


def _run(command: tuple[str, ...], timeout_seconds: int) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(  # noqa: S603  # the compiler that the user has or names
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {timeout_seconds} s") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in an argument
        raise BuildError(f"{command[0]} cannot be run: {error}") from error


def _check_library(library: Path, compiler: str) -> None:
    """Load a new library in a process of its own, since a damaged one kills the process.

    Raises:
        BuildError: it wrote nothing, or something that cannot be loaded.
    """
    if not library.is_file():
        raise BuildError(f"{compiler} reported success and wrote no library")
    # Where Python is embedded in a program, that program is no interpreter; loading then has to show it.
    if not Path(sys.executable or "").name.startswith(("python", "pypy")):
        return
    done = _run((sys.executable, "-I", "-S", "-c", _LOAD, str(library)), _TIMEOUT_SECONDS)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(f"{compiler} reported success, but wrote no library that can be loaded: {lines[-1]}")
