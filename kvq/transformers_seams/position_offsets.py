"""The offsets between tokens and positions that a model with images keeps in itself, and not in its cache.

Qwen2-VL and its kin give an image fewer positions than tokens. What is left of the difference stays in the model as
`rope_deltas`, from the forward with the image on, so a cache goes on rightly only beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

OFFSETS = "rope_deltas"
"""The attribute that holds them, whole numbers `[B, 1]`, or None before the first forward."""


def find_offset_holder(model: Any) -> nn.Module | None:
    """Return the module of a model that keeps its offsets, or None where there is none.

    Args:
        model: a model, a configuration, or None.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if OFFSETS in vars(module)), None)


def read_offsets(holder: nn.Module | None) -> torch.Tensor | None:
    """Return the offsets of the latest forward `[B, 1]`, or None."""
    found: torch.Tensor | None = getattr(holder, OFFSETS, None)
    return found


def restore_offsets(holder: nn.Module, offsets: torch.Tensor) -> None:
    """Let a model go on with these offsets."""
    parameter = next(holder.parameters(), offsets)
    setattr(holder, OFFSETS, offsets.to(parameter.device))
