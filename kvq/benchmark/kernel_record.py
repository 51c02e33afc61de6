"""The benchmark record that a run gives of a kernel: its error against dequantize-then-attend, and its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvq.attention.proving.benchmark_records import device_class

SHORTEST_LENGTH = 8192
"""Fewest tokens at which speed counts."""
REFERENCE_KERNEL = "eager"
"""The kernel that needs no record."""


def summarize_kernel(results: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any] | None:
    """Return the largest error and the least speed of the kernel that read the layers; None without one.

    Args:
        results: results of one layer, as `describe_results` returns them.
        device: the device that was measured.
    """
    fused = [
        (facts, one)
        for facts in results
        for one in facts["contenders"]
        if one["relative_error"] is not None and one["kernel"] not in ("", REFERENCE_KERNEL) and one["step_ms"]
    ]
    errors = [one["relative_error"] for facts, one in fused if facts["dtype"] == "float32"]
    speeds = [1 / one["to_buffer"]["median"] for facts, one in fused if facts["length"] >= SHORTEST_LENGTH]
    kernels = {one["kernel"] for _, one in fused}
    if len(kernels) != 1 or not errors or not speeds:
        return None
    return {
        "kernel": kernels.pop(),
        "device_class": device_class(device),
        "relative_error": max(errors),
        "speedup": min(speeds),
    }
