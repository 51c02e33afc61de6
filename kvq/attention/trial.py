"""The first use of a kernel on a device: one step is computed by the reference as well."""

from __future__ import annotations

import torch

from kvq.attention.kernel import Choice, Kernel, choose, distrust
from kvq.attention.request import AttentionRequest
from kvq.user_warnings import warn_user

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the reference, relative to its largest output: rounding, and sums in another order."""


def attend_on_trial(choice: Choice, reference: Kernel, request: AttentionRequest) -> tuple[Choice, torch.Tensor]:
    """Serve a request by a kernel that is new here, and by the reference.

    Returns:
        The choice to keep and the output: those given, or others where the two disagree, with a warning.
    """
    if choice.kernel is reference:
        return choice, reference.attend(request)
    expected, output = reference.attend(request), choice.kernel.attend(request)
    difference = _relative_difference(output, expected)
    if difference <= TOLERANCE[request.query.dtype]:
        return choice, output
    device = request.query.device
    distrust(choice.kernel, device, f"differed from the reference by {difference:.1e} of the largest output")
    warn_user(
        f"attention kernel {choice.kernel.name!r} on {device} differs from the reference by {difference:.1e} of the "
        f"largest output (at most {TOLERANCE[request.query.dtype]:.0e} is accepted); it is not used on this device "
        "again, and the reference takes its place; please report this with the output of `kvq doctor --json`"
    )
    return choose(request), expected


def _relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest output; infinite where NaN stands in one only."""
    known = expected.isfinite()
    if not torch.equal(known, output.isfinite()):
        return float("inf")
    expected = expected[known].float()
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((output[known].float() - expected).abs().max() / scale).item())
