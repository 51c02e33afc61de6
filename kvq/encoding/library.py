"""The compiled code as a function, loaded once in a process, and whether it may still be called there."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvq.attention.kernels.compiled.compiler import BuildError
from kvq.attention.kernels.compiled.kept_library import BuiltLibrary, load_library
from kvq.attention.kernels.compiled.torch_threads import find_run_parallel
from kvq.encoding.structure import EncodeRequest

_LOG = logging.getLogger("kvq")
SOURCE = Path(__file__).with_name("encode.c")


@dataclass(frozen=True)
class EncodeLibrary:
    """The library, ready to be called.

    Attributes:
        encode: takes the address of an `EncodeRequest`; returns 0, or 1 where memory ran out.
        run_parallel: address of torch's own function that runs a function on several threads, or None.
    """

    encode: Any
    run_parallel: int | None


def find_encode_library() -> EncodeLibrary | None:
    """Return the library, built if need be, or None where it is unavailable; a line in the log says why, once."""
    found = _load_once()
    return None if isinstance(found, BuildError) else found


def why_encode_unavailable() -> str | None:
    """Return in one line why the library is unavailable, or None; builds it if need be."""
    found = _load_once()
    return str(found) if isinstance(found, BuildError) else None


@cache
def _load_once() -> EncodeLibrary | BuildError:
    try:
        return load_library(SOURCE, _open)
    except BuildError as error:
        _LOG.info("quantizing on the CPU does without its compiled code and is several times slower: %s", error)
        return error


def _open(built: BuiltLibrary) -> EncodeLibrary:
    try:
        loaded = ctypes.CDLL(str(built.path))
        encode, size = loaded.kvq_encode, loaded.kvq_encode_size
    except (OSError, AttributeError) as error:
        raise BuildError(f"{built.path} is not the library that was to be built: {error}") from error
    finally:
        built.release()
    size.argtypes, size.restype = (), ctypes.c_int64
    if size() != ctypes.sizeof(EncodeRequest):
        raise BuildError("the compiler lays out EncodeRequest in another way than Python's ctypes")
    encode.argtypes, encode.restype = (ctypes.c_void_p,), ctypes.c_int
    return EncodeLibrary(encode, find_run_parallel())
