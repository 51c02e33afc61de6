"""The machine that a figure was measured on: processor, threads, device and versions."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from kvq.registry.requirements import find_versions

OPTIONAL_DISTRIBUTIONS = ("numba", "triton")
"""Distributions that kernels use if they are installed."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return plain values that tell one machine from another."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": find_cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": find_versions(OPTIONAL_DISTRIBUTIONS),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def find_cpu_name() -> str:
    """Return the name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def find_available_bytes(device: torch.device) -> int | None:
    """Return the memory that a run may take on the device; None if the system does not say."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    info = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", info.read_text(), re.MULTILINE) if info.is_file() else None
    return int(found[1]) * 1024 if found else None


def _total_memory() -> int | None:
    info = Path("/proc/meminfo")
    found = re.search(r"^MemTotal:\s*(\d+) kB", info.read_text(), re.MULTILINE) if info.is_file() else None
    return int(found[1]) * 1024 if found else None
