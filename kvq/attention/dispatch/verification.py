"""The first use of a kernel on a device: one step of each kind is computed by the reference as well.

A kind that has agreed once is not compared again, in any layer of any cache: the reference is slow where the context is
long, and would run again in every layer at every `generate`.
"""

from __future__ import annotations

import torch

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.dispatch.kernel_registry import Choice, KernelRegistry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.user_warnings import warn_user


def attend_verified(
    choice: Choice, reference: Kernel, request: AttentionRequest, registry: KernelRegistry, *, wanted: str | None = None
) -> tuple[Choice, torch.Tensor]:
    """Serve a request by a kernel that is new to a layer; by the reference too, unless the two have agreed on its like.

    Args:
        choice: the registry's choice for the request.
        reference: the kernel to compare with.
        request: the call to serve.
        registry: notes a kernel that agrees, and disables one that does not.
        wanted: as for `choose`.

    Returns:
        The choice to keep and the output: those given, or others where the two disagree, with a warning.
    """
    kernel, kind = choice.kernel, request.kind_across_layers()
    if kernel is reference or registry.is_verified(kernel, kind):
        return choice, kernel.attend(request)
    expected, output = reference.attend(request), kernel.attend(request)
    difference, tolerance = relative_difference(output, expected), TOLERANCE[request.query.dtype]
    if difference <= tolerance:
        registry.note_verified(kernel, kind)
        return choice, output
    device = request.query.device
    registry.distrust(kernel, device, f"differed from the reference by {difference:.1e} of the largest output")
    warn_user(
        f"attention kernel {kernel.name!r} on {device} differs from the reference by {difference:.1e} of the "
        f"largest output (at most {tolerance:.0e} is accepted); it is not used on this device "
        "again, and the reference takes its place; please report this with the output of `kvq doctor --json`"
    )
    return registry.choose(request, wanted=wanted), expected
