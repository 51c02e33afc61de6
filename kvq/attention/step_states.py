"""What stands for the keys and the values of one step while it is recorded: attention takes its query to them.

It must not know how the step attends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

TakeQuery = Callable[[torch.Tensor, torch.Tensor | None, Mapping[str, Any]], torch.Tensor]


class StepStates:
    """The keys or the values of one layer in one step.

    Args:
        take_query: takes the query `[B, Hq, 1, D_k]`, the mask and the other arguments of attention; returns the output
            `[B, 1, Hq, D_v]`.
    """

    def __init__(self, take_query: TakeQuery) -> None:
        self.take_query = take_query
