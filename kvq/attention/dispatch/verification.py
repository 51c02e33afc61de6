"""The first use of a kernel on a device: one step of each kind is computed by the reference as well.

A kind that has agreed once is not compared again, in any layer of any cache: the reference is slow where the context is
long, and would run again in every layer at every `generate`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.dispatch.kernel_registry import Choice, KernelRegistry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.affine import AffineCodec
from kvq.store.side import SideView
from kvq.user_warnings import warn_user


def attend_verified(
    choice: Choice, reference: Kernel, request: AttentionRequest, registry: KernelRegistry, *, wanted: str | None = None
) -> tuple[Choice, torch.Tensor]:
    """Serve a request by a kernel that is new to a layer; by the reference too, unless the two have agreed on its like.

    Args:
        choice: what the registry chose for the request.
        reference: the kernel to compare with.
        request: what is asked.
        registry: notes what agrees, and disables what does not.
        wanted: as for `choose`.

    Returns:
        The choice to keep and the output: those given, or others where the two disagree, with a warning.
    """
    kernel, kind = choice.kernel, describe(request)
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


def describe(request: AttentionRequest) -> Hashable:
    """Return what decides which code of a kernel runs for a request: everything but numbers and lengths."""
    query, mask = request.query, request.mask
    return (
        query.device,
        query.dtype,
        request.queries_per_head,
        query.shape[2] > 1,
        request.is_causal,
        None if mask is None else mask.dtype,
        request.softcap is None,
        request.sink_logits is None,
        request.is_reordered,
        _describe_side(request.pair.key),
        _describe_side(request.pair.value),
    )


def _describe_side(side: SideView) -> Hashable:
    return (
        side.like.dtype,
        side.like.shape[3],
        side.store.device,  # None: nothing is stored
        side.sinks.states is None,
        len(set(side.sinks.starts)) > 1,
        _describe_quantizer(side.store.quantizer),
    )


def _describe_quantizer(quantizer: Quantizer) -> Hashable:
    if not isinstance(quantizer, AffineCodec):
        parts = sorted((name, tuple(part.shape), str(part.dtype)) for name, part in quantizer.layout().items())
        return getattr(quantizer, "kind", type(quantizer)), quantizer.block_length, tuple(parts)
    spec = quantizer.spec
    groups = spec.nbits, quantizer.per_channel, spec.group_length, quantizer.block_length
    dtypes = quantizer.scale_dtype, spec.metadata_dtype, quantizer.compute_dtype
    return (*groups, *dtypes, quantizer.rotation is None)
