"""Narrowing the range of a group before it is rounded: fewer numbers decide the step, and those beyond it are cut.

A backend spreads its codes from the least to the largest element of a group. With few codes that is too far: the two
outermost codes serve one element each. Rotated states have no outliers to lose (docs/method.md).
"""

from __future__ import annotations

import torch


def clip(groups: torch.Tensor, share: float) -> torch.Tensor:
    """Return groups `[..., G]` with every element inside the middle `share` of the range of its group, new."""
    margin = (1 - share) / 2
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    cut = high * margin - low * margin  # in this order: the whole range may be past the largest fp32
    return groups.clamp(low + cut, high - cut)
