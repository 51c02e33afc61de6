"""Floating point of 8 and 4 bits, with a scale for a tensor, a token and head, or 16 elements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvq.exporting.state_format import PerToken, StateFormat

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of OCP's 4-bit floating point."""
FP4_BLOCK = 16
"""Elements that share a scale in 4-bit floating point."""


@dataclass(frozen=True)
class Float8(StateFormat):
    """8-bit floating point under one scale for all states of a layer's side, which is 1 without a calibration.

    Attributes:
        name: its name in the engine.
        dtype: the format of the numbers.
        scale: what the states are divided by.
    """

    name: str
    dtype: torch.dtype
    scale: float = 1.0
    groups: str = "one scale for the whole tensor, 1.0 unless the checkpoint has one"

    def bits(self, head_dim: int) -> float:
        """Return 8."""
        del head_dim
        return 8.0

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states; those past the largest number become it."""
        return cast_saturated(states / self.scale, self.dtype) * self.scale


@dataclass(frozen=True)
class Float8PerToken(PerToken):
    """`float8_e4m3fn` under a float32 scale for each token and head: the largest magnitude becomes 448."""

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        dtype = torch.float8_e4m3fn
        scale = (states.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).clamp_min(1e-6)
        return cast_saturated(states / scale, dtype) * scale


@dataclass(frozen=True)
class Float4(StateFormat):
    """E2M1 in blocks of 16 elements: MXFP4's scales are powers of two, NVFP4's are `float8_e4m3fn`.

    Attributes:
        name: its name in the engine.
        kind: `mx` or `nv`.
        scale: for `nv`, the scale of the whole tensor, which its calibration decides.
    """

    name: str
    kind: Literal["mx", "nv"]
    scale: float = 1.0
    groups: str = "16 elements of a head"

    def bits(self, head_dim: int) -> float:
        """Return the codes and one byte for each block."""
        del head_dim
        return 4 + 8 / FP4_BLOCK

    def fits(self, head_dim: int) -> bool:
        """Return whether heads are made of whole blocks."""
        return head_dim % FP4_BLOCK == 0

    def calibrated(self, states: torch.Tensor) -> StateFormat:
        """Return the format whose tensor's scale lets the largest block have the largest scale."""
        if self.kind == "mx":
            return self
        largest = states.abs().amax().item() / (E2M1_LEVELS[-1] * torch.finfo(torch.float8_e4m3fn).max)
        return replace(self, scale=largest or 1.0)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        blocks = states.unflatten(-1, (-1, FP4_BLOCK))
        step = blocks.abs().amax(-1, keepdim=True) / E2M1_LEVELS[-1]
        if self.kind == "mx":
            step = torch.exp2(torch.log2(step.clamp_min(1e-10)).ceil())
        else:
            step = cast_saturated(step / self.scale, torch.float8_e4m3fn) * self.scale
        read = _nearest_e2m1(blocks / step.masked_fill(step == 0, 1)) * step
        return read.flatten(-2)


def cast_saturated(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp32 numbers rounded to a dtype of 8 bits; those past its largest become it."""
    most = torch.finfo(dtype).max
    return numbers.clamp(-most, most).to(dtype).float()


def _nearest_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(E2M1_LEVELS, device=numbers.device)
    between = (levels[1:] + levels[:-1]) / 2
    return torch.copysign(levels[torch.bucketize(numbers.abs(), between)], numbers)
