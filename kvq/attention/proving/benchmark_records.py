"""Which kernels have a passing benchmark record on which class of device: the table `benchmarked.json`.

An entry stands for a record in `benchmarks/results/`, made on a device of that class by `scripts/prove_kernel.py`; a
test compares the two. Without an entry a kernel is tried on the spot, see `trial.py`: one that is right and fast on one
processor may be neither on another.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import torch

MAX_RELATIVE_ERROR = 1e-3
"""Largest error against dequantize-then-attend in fp32 that a passing record may have, relative to the output."""
MIN_SPEEDUP = 1.0
"""Least speed against attention over a preallocated full-precision buffer with packed queries."""


def device_class(device: torch.device) -> str:
    """Return the class of a device; devices of one class run the same code in the same way.

    Examples: "cpu-x86_64-avx512", "cpu-aarch64", "cuda-sm90".
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    if device.type == "cpu":
        return _cpu_class()
    return device.type


def find_benchmark_record(kernel: str, of_class: str) -> Mapping[str, Any] | None:
    """Return the entry of the table for a kernel on a class of device, or None.

    An entry has "kernel", "device_class", "record" (path below `benchmarks/results/`), "relative_error" (the largest,
    against dequantize-then-attend in fp32) and "speedup" (the least, against a preallocated full-precision buffer).
    """
    for entry in load_benchmark_records():
        if (entry["kernel"], entry["device_class"]) == (kernel, of_class) and is_passing(entry):
            return entry
    return None


def is_passing(entry: Mapping[str, Any]) -> bool:
    """Return whether the kernel of an entry was right and fast."""
    return bool(entry["relative_error"] <= MAX_RELATIVE_ERROR and entry["speedup"] > MIN_SPEEDUP)


@cache
def load_benchmark_records() -> tuple[Mapping[str, Any], ...]:
    """Return the whole table."""
    text = resources.files("kvq.attention.proving").joinpath("benchmarked.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["proven"])


@cache
def _cpu_class() -> str:
    machine = platform.machine().lower()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    level = next((name for name in ("avx512", "avx2") if name in capability), "")
    return "-".join(part for part in ("cpu", machine, level) if part)
