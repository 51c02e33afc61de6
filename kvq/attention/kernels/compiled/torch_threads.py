"""Torch's own threads, for compiled code: a second set of threads would fight with them for the processor."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def find_run_parallel() -> int | None:
    """Return the address of `GOMP_parallel` in the OpenMP that torch itself is linked with; None where it has none."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
