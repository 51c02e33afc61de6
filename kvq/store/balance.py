"""Evening out the tokens of a block before they are rounded: each is divided by a factor of its own.

Per-channel groups run along tokens, so a long token decides the step that all others of its block are rounded with. The
factor is the token's root mean square against the largest one of the block, in steps of 2 ** (1 / 32), and is stored as
one byte. Rows and columns that are evened out in turn, as KVarN (arXiv 2606.03458) and SINQ (arXiv 2509.22944) do,
measured the same (docs/method.md): the scale of a group is the factor of its column already.

The same states give the same bytes however they are split: sums are added in a fixed order, and logarithms are found
by comparing.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from kvq.plugin_api.packed_format import FACTOR_STEPS
from kvq.store.tables import Table

LARGEST_EXPONENT = 100
"""Blocks with larger numbers are left as they are: a short token with one large element could overflow."""


FACTORS = Table(2 ** (-code / FACTOR_STEPS) for code in range(256))
"""The factor of each code."""
INVERSE_FACTORS = Table(2 ** (code / FACTOR_STEPS) for code in range(256))
"""What a token with each code is multiplied by before it is rounded."""
FACTOR_BOUNDARIES = Table(2 ** ((2 * code + 1) / FACTOR_STEPS) for code in range(255))
"""Where a ratio of sums of squares passes from one code to the next."""


def even_out(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks `[..., L, D]` fp32 with tokens of nearly equal length, new, and the codes of their factors.

    The codes are uint8 `[..., L]`, see `read_factors`; elements that are not finite count as zeros.
    """
    peak = torch.maximum(blocks.amax((-2, -1)), -blocks.amin((-2, -1)))
    finite = blocks
    # Elsewhere asking takes longer than filling. The sum of finite numbers may be infinite, which costs time only.
    if peak.device.type != "cpu" or not math.isfinite(peak.sum().item()):
        finite = blocks.masked_fill(~blocks.isfinite(), 0)
        peak = finite.abs().amax((-2, -1))
    mantissa, exponent = torch.frexp(peak)
    # By a power of two first, else squares would end before the numbers do. For nothing but zeros it is NaN.
    unit = (mantissa / peak).clamp_(2.0**-126, 2.0**126)
    squares = _sum_squares(finite * unit[..., None, None])
    ratio = squares.amax(-1, keepdim=True) / squares
    codes = torch.bucketize(ratio.contiguous(), FACTOR_BOUNDARIES.on(blocks.device))
    # Nothing but zeros has no ratio, and numbers at the end of fp32 have no room.
    is_left = ratio.isnan() | (exponent > LARGEST_EXPONENT)[..., None]
    codes = codes.masked_fill_(is_left, 0)
    return blocks * INVERSE_FACTORS.on(blocks.device)[codes][..., None], codes.to(torch.uint8)


def read_factors(codes: torch.Tensor) -> torch.Tensor:
    """Return the factors `2 ** (-code / 32)` of tokens in fp32, new, in the shape of `codes`."""
    return FACTORS.on(codes.device)[codes.long()]


def _sum_squares(states: torch.Tensor) -> torch.Tensor:
    """Return the sums over the last dimension in an order that depends on its length alone; overwrites `states`."""
    squares = states.square_()
    length = squares.shape[-1]
    if length & (length - 1):
        squares = functional.pad(squares, (0, (1 << length.bit_length()) - length))
    while squares.shape[-1] > 1:
        low, high = squares.chunk(2, dim=-1)
        squares = low + high
    return squares.squeeze(-1)
