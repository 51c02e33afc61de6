"""Which kernels there are, and how one is chosen.

A kernel is one implementation of attention over a quantized layer: the eager reference, a compiled one for a class of
device. Another kernel is one more file, and one line in `kvq/attention/kernels/own_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from kvq.attention.dispatch.kernel import Kernel, ProvenKernel
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.dispatch.standing import Standing, find_standing, try_again
from kvq.attention.machine.variables import KERNEL_VARIABLE, read_variable
from kvq.errors import ConfigError, Fault


@dataclass(frozen=True)
class Choice:
    """The kernel for one kind of request, and why it is that one.

    Attributes:
        kernel: the chosen one.
        passed_over: for each kernel that would have come before it, the reason against it.
    """

    kernel: Kernel
    passed_over: dict[str, str] = field(default_factory=dict)


_KERNELS: dict[str, Kernel] = {}
_DISTRUSTED: dict[tuple[str, torch.device], str] = {}


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel; those that are registered first are preferred."""
    _KERNELS[kernel.name] = kernel


def available_kernels() -> tuple[Kernel, ...]:
    """Return all kernels, the preferred ones first."""
    return tuple(_KERNELS.values())


def distrust(kernel: Kernel, device: torch.device, reason: str) -> None:
    """Use a kernel on a device no more, in this process."""
    _DISTRUSTED[kernel.name, device] = reason


def is_distrusted(kernel: Kernel, device: torch.device) -> bool:
    """Return whether a kernel has differed from the reference on a device in this process."""
    return (kernel.name, device) in _DISTRUSTED


def choose(request: AttentionRequest) -> Choice:
    """Return the first kernel with no reason against it.

    Raises:
        ConfigError: `KVQ_ATTENTION_KERNEL` names no kernel.
    """
    wanted = wanted_kernel()
    # What is named is tried first, the others in their order.
    candidates = sorted(available_kernels(), key=lambda kernel: kernel.name != wanted)
    passed_over: dict[str, str] = {}
    for kernel in candidates:
        device, is_wanted = request.query.device, kernel.name == wanted
        # What serves no such request is not tried for it.
        reason = _find_exclusion(kernel, device) or kernel.find_obstacle(request)
        reason = reason or find_reason_against(kernel, device, is_wanted=is_wanted, may_try=True)
        reason = reason or kernel.find_problem()
        if reason is None:
            return Choice(kernel, passed_over)
        passed_over[kernel.name] = reason
    # The reference is registered by the package and takes everything.
    raise ConfigError([Fault((KERNEL_VARIABLE,), f"no kernel serves this request: {passed_over}")])


def find_reason_against(
    kernel: Kernel, device: torch.device, *, is_wanted: bool = False, may_try: bool = False
) -> str | None:
    """Return why a kernel is not a default on a device, whatever the request, or None.

    Args:
        kernel: the kernel.
        device: where the query lives.
        is_wanted: the user asked for it by name, which does without the proof.
        may_try: whether a kernel of which nothing is known may be tried now.
    """
    exclusion = _find_exclusion(kernel, device)
    if exclusion is not None or is_wanted:
        return exclusion
    standing = examine(kernel, device, may_try=may_try)
    return None if standing is None else standing.reason


def examine(kernel: Kernel, device: torch.device, *, may_try: bool = False, must_try: bool = False) -> Standing | None:
    """Return what is known of a kernel that needs proof; None for one that needs none.

    Args:
        kernel: the kernel, which runs on this type of device.
        device: where the query would live.
        may_try: whether a kernel of which nothing is known may be tried now.
        must_try: whether it is tried whatever is known.
    """
    if not kernel.needs_proof:
        return None
    others, proven = _list_others(kernel, device), cast(ProvenKernel, kernel)
    if must_try and kernel.find_problem() is None:
        return try_again(proven, device, others)
    return find_standing(proven, device, others, may_try=may_try)


def _list_others(kernel: Kernel, device: torch.device) -> Sequence[Kernel]:
    """Return what may run on a device in place of a kernel, without a proof of its own, the preferred first."""
    known = [one for one in available_kernels() if not one.needs_proof and one.name != kernel.name]
    return [one for one in known if _find_exclusion(one, device) is None]


def _find_exclusion(kernel: Kernel, device: torch.device) -> str | None:
    if kernel.device_types and device.type not in kernel.device_types:
        return f"runs on {', '.join(sorted(kernel.device_types))} only"
    return _DISTRUSTED.get((kernel.name, device))


def wanted_kernel() -> str | None:
    """Return the kernel that `KVQ_ATTENTION_KERNEL` names, or None.

    Raises:
        ConfigError: there is none of that name.
    """
    name = read_variable(KERNEL_VARIABLE)
    if name is None or name == "auto":
        return None
    if name not in _KERNELS:
        problem = f"{name!r} is not a kernel; choose one of 'auto', {', '.join(map(repr, _KERNELS))}"
        raise ConfigError([Fault((KERNEL_VARIABLE,), problem)], source="the environment")
    return name
