"""The first use of a kernel on a device: one step of each kind is computed by the reference as well.

What has agreed once is not tried again in this process, by any layer of any cache: the reference is slow where the
context is long, and would run again in every layer at every `generate`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.dispatch.kernel_registry import Choice, choose, distrust
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.affine import AffineCodec
from kvq.store.side import SideView
from kvq.user_warnings import warn_user

_PASSED: set[Hashable] = set()


def forget_trials() -> None:
    """Try every kernel again at its next use of each kind; what is distrusted stays so."""
    _PASSED.clear()


def attend_on_trial(choice: Choice, reference: Kernel, request: AttentionRequest) -> tuple[Choice, torch.Tensor]:
    """Serve a request by a kernel that is new to a layer, and by the reference unless the two have agreed on its like.

    Returns:
        The choice to keep and the output: those given, or others where the two disagree, with a warning.
    """
    trial = choice.kernel.name, describe(request)
    if choice.kernel is reference or trial in _PASSED:
        return choice, choice.kernel.attend(request)
    expected, output = reference.attend(request), choice.kernel.attend(request)
    difference = relative_difference(output, expected)
    if difference <= TOLERANCE[request.query.dtype]:
        _PASSED.add(trial)
        return choice, output
    device = request.query.device
    distrust(choice.kernel, device, f"differed from the reference by {difference:.1e} of the largest output")
    warn_user(
        f"attention kernel {choice.kernel.name!r} on {device} differs from the reference by {difference:.1e} of the "
        f"largest output (at most {TOLERANCE[request.query.dtype]:.0e} is accepted); it is not used on this device "
        "again, and the reference takes its place; please report this with the output of `kvq doctor --json`"
    )
    return choose(request), expected


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
