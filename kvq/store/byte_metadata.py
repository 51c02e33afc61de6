"""Scales and middles of groups in one byte each, against two numbers of their block.

A scale is stored as the power of 2 ** (-1 / 32) by which it stays below the largest scale of its block: within 1.1 % of
what the backend decided down to a 245th of the largest, and 0 below a 490th. A middle is stored as a multiple of one
step for all groups of the block, a 127th of the largest magnitude among them.

The same numbers give the same bytes however they are split: the nearest power is found by comparing.
"""

from __future__ import annotations

import torch

from kvq.plugin_api.packed_format import FACTOR_STEPS, LOST_MID, ZERO_SCALE
from kvq.store.balance import read_factors
from kvq.store.tables import Table

LARGEST_MID = 127
"""The largest magnitude of a middle's code."""

# Where the ratio of the largest scale to one passes from a code to the next. The last one is halfway from the smallest
# scale there is to none.
_BETWEEN = (2 ** ((2 * code + 1) / (2 * FACTOR_STEPS)) for code in range(ZERO_SCALE - 1))
SCALE_BOUNDARIES = Table([*_BETWEEN, 2 * 2 ** ((ZERO_SCALE - 1) / FACTOR_STEPS)])


def write_bytes(scale: torch.Tensor, mid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round the scales and middles of groups to bytes.

    Args:
        scale: fp32 `[B, H, blocks, ...]`, 0 or above.
        mid: the same shape; NaN for a group that is lost.

    Returns:
        The parts `scale` uint8 and `mid` int8 in that shape, and `units`, fp32 `[B, H, blocks, 2]`.
    """
    largest = scale.flatten(3).amax(-1)
    lost = mid.isnan()
    step = mid.masked_fill(lost, 0).abs().flatten(3).amax(-1) / LARGEST_MID
    ratio = _meet(largest, scale) / scale
    codes = torch.bucketize(ratio.contiguous(), SCALE_BOUNDARIES.on(scale.device))
    multiples = (mid / _meet(step, mid)).round_().clamp_(-LARGEST_MID, LARGEST_MID)
    return {
        # 0 / 0, where all scales of the block are 0, is no ratio.
        "scale": codes.masked_fill_(scale == 0, ZERO_SCALE).to(torch.uint8),
        # 0 / 0 again: all middles are 0.
        "mid": multiples.nan_to_num_(0).masked_fill_(lost, LOST_MID).to(torch.int8),
        "units": torch.stack([largest, step], dim=-1),
    }


def read_bytes(scale: torch.Tensor, mid: torch.Tensor, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and middles that parts stand for, fp32; NaN is the middle of a lost group."""
    largest, step = units.unbind(-1)
    factors = read_factors(scale).masked_fill_(scale == ZERO_SCALE, 0)
    middles = mid.float().masked_fill_(mid == LOST_MID, torch.nan)
    return factors.mul_(_meet(largest, scale)), middles.mul_(_meet(step, mid))


def _meet(of_block: torch.Tensor, of_groups: torch.Tensor) -> torch.Tensor:
    """Return a number of each block in a shape that meets those of its groups."""
    return of_block.reshape(*of_block.shape, *[1] * (of_groups.dim() - of_block.dim()))
