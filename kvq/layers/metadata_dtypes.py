"""Which dtypes the scales and middles of groups are stored in."""

from __future__ import annotations

import math

import torch

from kvq.config import ResolvedSide

HALF_METADATA_MAX_BITS = 4
"""Widest codes whose error a float16 mid raises by less than a tenth at |mean| / std = 100; at 5 bits by up to 1.2.

That holds where a group has two elements for each code value or more. The range of a shorter group, and with it the
step, is smaller: 4 bits in groups of 16 raise the error by 1.11, in groups of 8 by 1.26.
"""

BYTE_METADATA_MAX_BITS = 4
"""Widest codes whose scales may be bytes: all but tiny ones are off by up to 1.1 %, a twelfth of a step at the ends of
4 bits."""


def are_bytes(chosen: ResolvedSide) -> bool:
    """Return whether scales and middles of a side are stored in a byte each."""
    return chosen.metadata_dtype is torch.int8 and chosen.nbits <= BYTE_METADATA_MAX_BITS


def find_mid_dtype(chosen: ResolvedSide, group_length: int) -> torch.dtype:
    """Return the dtype of the middles of a side."""
    asked = _find_asked(chosen)
    if asked is not None:
        return asked
    bits = math.ceil(chosen.nbits)
    half_suffices = bits <= HALF_METADATA_MAX_BITS and 2 ** (bits + 1) <= group_length
    return torch.float16 if half_suffices else torch.float32


def find_scale_dtype(chosen: ResolvedSide) -> torch.dtype:
    """Return the dtype of the scales of a side.

    What a wide code demands of a middle it does not demand of a scale, whose error counts by the code, not by the mean.
    """
    return torch.uint8 if are_bytes(chosen) else _find_asked(chosen) or torch.float16


def _find_asked(chosen: ResolvedSide) -> torch.dtype | None:
    is_too_narrow = chosen.metadata_dtype is torch.int8 and not are_bytes(chosen)
    return None if is_too_narrow else chosen.metadata_dtype
