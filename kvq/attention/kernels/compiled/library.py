"""The compiled kernel as a function, loaded once in a process."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvq.attention.kernels.compiled.compiler import BuildError
from kvq.attention.kernels.compiled.kept_library import BuiltLibrary, load_library
from kvq.attention.kernels.compiled.structures import IN_ORDER
from kvq.attention.kernels.compiled.torch_threads import find_run_parallel

_LOG = logging.getLogger("kvq")
SOURCE = Path(__file__).with_name("attend.c")


@dataclass(frozen=True)
class Library:
    """The library, ready to be called.

    Attributes:
        attend: takes the address of a `PackedRequest`; returns 0, or 1 where memory ran out.
        run_parallel: address of the function of torch's own OpenMP that runs a function on several threads, which
            spares a second set of threads; None where torch has another kind of threads.
        digest: digest of the library's bytes.
    """

    attend: Any
    run_parallel: int | None
    digest: str


def get_library() -> Library:
    """Return the library, built if need be.

    Raises:
        BuildError: it is unavailable; `why_unavailable` says why.
    """
    found = _load_once()
    if isinstance(found, BuildError):
        raise found
    return found


def why_unavailable() -> str | None:
    """Return in one line why the library is unavailable, or None; builds it if need be."""
    found = _load_once()
    return str(found) if isinstance(found, BuildError) else None


@cache
def _load_once() -> Library | BuildError:
    try:
        return load_library(SOURCE, _open)
    except BuildError as error:
        _LOG.warning("attention on the CPU does without its compiled kernel and is several times slower: %s", error)
        return error


def _open(built: BuiltLibrary) -> Library:
    try:
        loaded = ctypes.CDLL(str(built.path))
        attend, sizes = loaded.kvq_attend, loaded.kvq_sizes
    except (OSError, AttributeError) as error:
        raise BuildError(f"{built.path} is not the library that was to be built: {error}") from error
    finally:
        built.release()
    sizes.argtypes, sizes.restype = (ctypes.c_int64,), ctypes.c_int64
    for number, structure in enumerate(IN_ORDER):
        if sizes(number) != ctypes.sizeof(structure):
            raise BuildError(f"the compiler lays out {structure.__name__} in another way than Python's ctypes")
    attend.argtypes, attend.restype = (ctypes.c_void_p,), ctypes.c_int
    return Library(attend, find_run_parallel(), built.digest)
