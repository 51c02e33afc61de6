"""Per-layer cache of kernel choices, and of what kernels keep between steps.

All of it can be made again at any time. A copy of a layer starts without: a kernel may keep addresses of chunks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class KernelCache:
    """Belongs to one layer, which reports its changes to it.

    Attributes:
        version: changes whenever the layer's contents change.
        choices: the kernel that was chosen for each kind of request.
        kernel_data: what kernels keep, under names of their own: no tensors but those of the layer itself.
        last_reader: how the layer was read the last time, for the report; empty before that.
        passed_over: the kernels that would have come before that one, each with the reason against it.
        wanted: name of the kernel to use if it can serve a request, instead of the one that `KVQ_ATTENTION_KERNEL`
            names.
    """

    def __init__(self) -> None:
        self.version = 0
        self.choices: dict[Hashable, Any] = {}
        self.kernel_data: dict[str, Any] = {}
        self.last_reader = ""
        self.passed_over: Mapping[str, str] = {}
        self.wanted: str | None = None

    def note_growth(self) -> None:
        """Take note that the layer holds more tokens; its earlier chunks are where they were."""
        self.version += 1

    def note_rearrangement(self) -> None:
        """Take note that tokens or rows of the layer are gone or in another order, and chunks perhaps with them."""
        self.version += 1
        self.kernel_data.clear()

    def forget_kernel_data(self) -> None:
        """Let go of chunks that kernels keep alive, where the layer still holds the same."""
        self.kernel_data.clear()

    def clear(self) -> None:
        """Take note that the layer was emptied: what comes next may be of another shape."""
        self.note_rearrangement()
        self.choices, self.last_reader, self.passed_over = {}, "", {}

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        return KernelCache, ()
