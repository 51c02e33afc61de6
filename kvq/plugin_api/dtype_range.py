"""Bringing numbers into the range of a floating-point dtype, which a cast does not do: it makes them infinite."""

from __future__ import annotations

import torch


def clamp_to_dtype(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return states with every number past the largest one of a dtype, infinity included, replaced by that; NaN stays.

    It does not cast: the states keep their dtype, for one rounding at the end (`out.copy_(clamp_to_dtype(...))`).

    Args:
        states: floating-point, any shape; not written to.
        dtype: a floating-point dtype, such as that of the `out` of `decode_into`; also a float8.

    Returns:
        A new tensor of the shape and dtype of `states`.

    Raises:
        TypeError: `dtype` is not floating-point.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"{dtype} has no range of floating-point numbers; give the dtype of states")
    largest = torch.finfo(dtype).max
    return states.clamp(-largest, largest)
