"""Bringing numbers into the range of a floating-point dtype, which a cast does not do: it makes them infinite."""

from __future__ import annotations

import math

import torch


def clamp_to_dtype(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return states with every number past the largest one of a dtype, infinity included, replaced by that; NaN stays.

    It does not cast: the states keep their dtype, for one rounding at the end (`out.copy_(clamp_to_dtype(...))`). The
    largest is a number of both dtypes: that of the states where `dtype` reaches further, and 65280 from bfloat16 to
    float16, whose 65504 bfloat16 would round to 65536, infinite there.

    Args:
        states: floating-point, any shape; not written to.
        dtype: a floating-point dtype, such as that of the `out` of `decode_into`; also a float8.

    Returns:
        A new tensor of the shape and dtype of `states`.

    Raises:
        TypeError: `dtype` or the dtype of `states` is not floating-point.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"{dtype} has no range of floating-point numbers; give the dtype of states")
    largest = _find_largest(states.dtype, dtype)
    return states.clamp(-largest, largest)


def _find_largest(own: torch.dtype, other: torch.dtype) -> float:
    """Return the largest number of the dtype `own` that is finite in the dtype `other` too."""
    mantissa, exponent = math.frexp(min(torch.finfo(own).max, torch.finfo(other).max))
    step = torch.finfo(own).eps / 2  # between numbers of `own` from 1/2 to 1, where the mantissa is
    return math.ldexp(mantissa // step * step, exponent)
