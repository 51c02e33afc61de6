"""hqq's quantization of groups, as an affine quantizer.

Owns the call into hqq and the frame in which hqq sees a group. hqq's guards and its optimizer are made for the weights
of models, and states may lie outside the range that they assume (hqq 0.2.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hqq.core.quantize import Quantizer

from kvq.plugin_api import AffineQuantizer

_CONSTANT_RANGE = 1e-4
"""hqq takes a range up to this one for a constant group."""

_LARGEST_INVERSE_SCALE = 2e4
"""hqq clamps its inverse scale to this, which makes the steps of narrow groups too coarse."""

_LARGEST_MAGNITUDE = 2.0**13
"""Up to here neither a state nor its inverse scale leaves the normal range of float16."""

_LARGEST_ZERO = {torch.float32: 2.0**16, torch.float16: 2.0**8}
"""Up to these zero points, rounding `x / scale + zero` in that dtype costs only a small part of a step."""

_LARGEST_FP32 = torch.finfo(torch.float32).max


class HQQQuantizer(AffineQuantizer):
    """hqq's `Quantizer.quantize` along rows, without its packing.

    Half-Quadratic Quantization of Large Machine Learning Models, Badri and Shaji, 2023
    (https://mobiusml.github.io/hqq_blog/).

    Args:
        nbits: one of hqq's `SUPPORTED_BITS`.
        optimize: whether the zero points are refined. The refinement stops when the mean error over all groups of the
            call stops falling, so its results are not local to a group.
    """

    def __init__(self, nbits: float, *, optimize: bool = True) -> None:
        self.nbits = nbits
        self.optimize = optimize
        self.group_local = not optimize

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize groups: `x ~ scale * code + offset`.

        Args:
            groups: fp32 `[..., G]`, finite, any device; not written to, and not aliased by the results.

        Returns:
            codes: uint8 `[..., G]`, below `2 ** ceil(nbits)`.
            scale: fp32 `[...]`, finite; 0 for a constant group.
            offset: fp32 `[...]`, finite.
        """
        rows = groups.detach().reshape(-1, groups.shape[-1])
        frame = find_frame(rows, round(2**self.nbits - 1), self._get_working_dtype(groups.device))
        codes, scale, zero = self._call_vendor((rows - frame.anchor) / frame.unit)
        scale = _clamp_finite(scale * frame.unit)
        offset = _clamp_finite(frame.anchor - zero * scale)
        leading = groups.shape[:-1]
        return (
            codes.to(torch.uint8).reshape(groups.shape),
            scale.masked_fill(frame.constant, 0).reshape(leading),
            offset.reshape(leading),
        )

    def _get_working_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype that hqq computes in: float16 for its optimizer on CUDA, float32 for everything else."""
        return torch.float16 if self.optimize and device.type == "cuda" else torch.float32

    def _call_vendor(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hqq's codes `[N, G]`, scale and zero point `[N, 1]`, all fp32, for rows fp32 `[N, G]`."""
        codes, meta = Quantizer.quantize(
            rows,
            nbits=self.nbits,
            channel_wise=True,
            group_size=rows.shape[-1],
            optimize=self.optimize,
            round_zero=False,
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device=rows.device,  # its own default is "cuda"
        )
        return codes, meta["scale"].float(), meta["zero"].float()


@dataclass(frozen=True)
class Frame:
    """How groups are shown to hqq: as `(x - anchor) / unit`, which is exact. Ordinary groups are shown as they are.

    Attributes:
        anchor: fp32 `[N, 1]`; 0, or an element of a group whose values are nearly equal. A constant group is thus shown
            as zeros, for which hqq's codes and zero point are 0.
        unit: fp32 `[N, 1]`; 1, or the power of two that brings the range of a group into [0.5, 1).
        constant: bool `[N, 1]`; whether all values of the group are equal.
    """

    anchor: torch.Tensor
    unit: torch.Tensor
    constant: torch.Tensor


def find_frame(rows: torch.Tensor, largest_code: int, working_dtype: torch.dtype) -> Frame:
    """Return the frame of each row of fp32 `[N, G]`.

    Args:
        rows: fp32 `[N, G]`.
        largest_code: levels of the code less one, 1 to 255.
        working_dtype: dtype that hqq computes in, float32 or float16.
    """
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    anchor = _find_anchor(low, high, _LARGEST_ZERO[working_dtype] / largest_code)
    return Frame(anchor, _find_unit(low - anchor, high - anchor, largest_code), low == high)


def _find_anchor(low: torch.Tensor, high: torch.Tensor, largest_bias: float) -> torch.Tensor:
    """Return `low` where a group is more than `largest_bias` ranges away from zero, else 0; all fp32 `[N, 1]`.

    `largest_bias` is above 1: all values of such a group lie within a factor of two of each other, and their
    differences are exact in floating point (Sterbenz).
    """
    nearest = torch.maximum(low, -high).clamp(min=0)
    return low.masked_fill(nearest <= (high - low) * largest_bias, 0)


def _find_unit(low: torch.Tensor, high: torch.Tensor, largest_code: int) -> torch.Tensor:
    """Return 1 where hqq's guards leave a group alone, else the power of two above its range; all fp32 `[N, 1]`."""
    extent = high - low
    is_wide_enough = (extent > _CONSTANT_RANGE) & (largest_code / extent <= _LARGEST_INVERSE_SCALE)
    is_small_enough = torch.maximum(high, -low) <= _LARGEST_MAGNITUDE
    # Bounded to keep the unit and its inverse normal numbers, even if the range is not finite.
    bounded = extent.clamp(2.0**-120, 2.0**120)
    power = bounded / torch.frexp(bounded).mantissa
    return power.masked_fill(is_wide_enough & is_small_enough, 1.0)


def _clamp_finite(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_LARGEST_FP32, _LARGEST_FP32)
