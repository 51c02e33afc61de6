"""Which processor this is, as far as the system tells. It must not know what depends on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_TELLING = ("model name", "flags", "Features", "CPU implementer", "CPU architecture", "CPU part")
"""Keys of /proc/cpuinfo that differ between processors with different instructions, on x86 and ARM."""


@cache
def describe_processor() -> str:
    """Return some lines that differ between processors with different instructions."""
    return "\n".join(sorted({line for line in _read_facts() if _key_of(line) in _TELLING})) or platform.processor()


@cache
def name_processor() -> str:
    """Return the name that people know the processor by, or its architecture where the system tells no more."""
    names = [line.partition(":")[2].strip() for line in _read_facts() if _key_of(line) == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _read_facts() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _key_of(line: str) -> str:
    return line.partition(":")[0].strip()
