"""What attention remembers of one layer from step to step: the chosen kernels and what these keep.

All of it can be made anew at any time. Copies of a layer start without it, since a kernel may keep addresses of chunks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class AttentionMemo:
    """Belongs to one layer.

    Attributes:
        choices: what `choose` found for each kind of request.
        plans: what kernels keep, under keys of their own; must hold no tensor but those of the layer itself.
        last_reader: how the layer was read the last time, for the report; empty before that.
        passed_over: the kernels that would have come before that one, each with the reason against it.
        wanted: name of the kernel to use if it can serve a request, in place of what `KVQ_ATTENTION_KERNEL` says.
    """

    def __init__(self) -> None:
        self.choices: dict[Hashable, Any] = {}
        self.plans: dict[Hashable, Any] = {}
        self.last_reader = ""
        self.passed_over: Mapping[str, str] = {}
        self.wanted: str | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.choices, self.plans, self.last_reader, self.passed_over = {}, {}, "", {}

    def __reduce__(self) -> tuple[type[AttentionMemo], tuple[()]]:
        return AttentionMemo, ()
