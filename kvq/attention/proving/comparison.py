"""Whether two outputs of attention agree: up to rounding, and sums in another order."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest accepted difference from the reference by dtype of the output, relative to its largest number.

In float32 it is twice what rounding of the compiled kernel is held to, which one request in two hundred near that limit
passes.
"""


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest number; infinite where only one output has NaN."""
    known = expected.isfinite()
    if not torch.equal(known, output.isfinite()):
        return float("inf")
    expected = expected[known].float()
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((output[known].float() - expected).abs().max() / scale).item())
