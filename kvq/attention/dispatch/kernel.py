"""What a kernel is: one implementation of attention over a quantized layer."""

from __future__ import annotations

from typing import Protocol

import torch

from kvq.attention.dispatch.request import AttentionRequest


class Kernel(Protocol):
    """One implementation of `attend`.

    Attributes:
        name: what the report, `kvq doctor` and `KVQ_ATTENTION_KERNEL` call it.
        device_types: the types of device that it runs on; empty: any.
        needs_benchmark: whether it is a default only where a benchmark has found it right and fast. The reference,
            with which the others are compared, needs none.
    """

    name: str
    device_types: frozenset[str]
    needs_benchmark: bool

    def why_unavailable(self) -> str | None:
        """Return what keeps the kernel from running on this machine (a compiler or a library is missing), or None."""
        ...

    def why_unsupported(self, request: AttentionRequest) -> str | None:
        """Return why the kernel cannot serve requests of this kind, in a few words, or None where it can.

        Asked once for each layer and `request.kind()`.
        """
        ...

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query."""
        ...


class BenchmarkedKernel(Kernel, Protocol):
    """A kernel that needs a benchmark."""

    def source_digest(self) -> str:
        """Return what tells this code from any other: a verdict on one says nothing of another.

        Asked only where the kernel is available.
        """
        ...
