"""What a kernel is, which there are, and how one is chosen.

A kernel is one implementation of attention over a quantized layer: the eager reference, a compiled one for a class of
device. Another kernel is one more file, and one line in `kvq/attention/kernels.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvq.attention.proof import device_class, find_proof
from kvq.attention.request import AttentionRequest
from kvq.errors import ConfigError, Fault

KERNEL_VARIABLE = "KVQ_ATTENTION_KERNEL"
"""Environment variable that names the kernel to use wherever it can run, proven or not; "auto" by default."""


class Kernel(Protocol):
    """One implementation of `attend`.

    Attributes:
        name: what the report, `kvq doctor` and `KVQ_ATTENTION_KERNEL` call it.
        device_types: types of device that it runs on; empty: any.
        needs_proof: whether it is a default only where a record proves it right and fast. The reference needs none.
    """

    name: str
    device_types: frozenset[str]
    needs_proof: bool

    def find_problem(self) -> str | None:
        """Return what keeps the kernel from running on this machine (a compiler or a library is missing), or None."""
        ...

    def find_obstacle(self, request: AttentionRequest) -> str | None:
        """Return why the kernel cannot serve requests of this kind, in a few words, or None where it can.

        Asked once for each layer and `request.kind()`.
        """
        ...

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query."""
        ...


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
        reason = find_reason_against(kernel, request.query.device, is_wanted=kernel.name == wanted)
        reason = reason or kernel.find_obstacle(request) or kernel.find_problem()
        if reason is None:
            return Choice(kernel, passed_over)
        passed_over[kernel.name] = reason
    # The reference is registered by the package and takes everything.
    raise ConfigError([Fault((KERNEL_VARIABLE,), f"no kernel serves this request: {passed_over}")])


def find_reason_against(kernel: Kernel, device: torch.device, *, is_wanted: bool = False) -> str | None:
    """Return why a kernel is not a default on a device, whatever the request, or None.

    Args:
        kernel: the kernel.
        device: where the query lives.
        is_wanted: the user asked for it by name, which does without the proof.
    """
    if kernel.device_types and device.type not in kernel.device_types:
        return f"runs on {', '.join(sorted(kernel.device_types))} only"
    if (kernel.name, device) in _DISTRUSTED:
        return _DISTRUSTED[kernel.name, device]
    if not kernel.needs_proof or is_wanted or find_proof(kernel.name, device_class(device)):
        return None
    return (
        f"no record proves it on {device_class(device)}; {KERNEL_VARIABLE}={kernel.name} uses it all the same, after "
        "a check against the reference"
    )


def wanted_kernel() -> str | None:
    """Return the kernel that `KVQ_ATTENTION_KERNEL` names, or None.

    Raises:
        ConfigError: there is none of that name.
    """
    name = os.environ.get(KERNEL_VARIABLE, "auto")
    if name == "auto":
        return None
    if name not in _KERNELS:
        problem = f"{name!r} is not a kernel; choose one of 'auto', {', '.join(map(repr, _KERNELS))}"
        raise ConfigError([Fault((KERNEL_VARIABLE,), problem)], source="the environment")
    return name
