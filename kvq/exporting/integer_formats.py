"""Integers under a scale for a tensor, a token and head, or a group of a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvq.exporting.state_format import PerToken, StateFormat


@dataclass(frozen=True)
class Int8PerTensor(StateFormat):
    """8-bit integers, -128 to 127, under one scale for all states of a layer's side, which a calibration finds."""

    name: str
    scale: float = 1.0
    groups: str = "one calibrated scale for the whole tensor"

    def bits(self, head_dim: int) -> float:
        """Return 8."""
        del head_dim
        return 8.0

    def calibrated(self, states: torch.Tensor) -> StateFormat:
        """Return the format under which the largest magnitude of these states becomes 127."""
        return replace(self, scale=states.abs().amax().item() / 127 or 1.0)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states; those past the largest of the calibration become it."""
        return (states / self.scale).round().clamp(-128, 127) * self.scale


@dataclass(frozen=True)
class Int8PerToken(PerToken):
    """8-bit integers under a float32 scale for each token and head: the largest magnitude becomes 127."""

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        scale = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
        return (states / scale).round().clamp(-128, 127) * scale


@dataclass(frozen=True)
class Int8BetweenExtremes(PerToken):
    """8-bit integers around the middle between the extremes of each token and head; scale and middle float16."""

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        least, largest = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
        middle = _as_half((least + largest) / 2)
        step = _as_half((largest - least) / 255)
        codes = ((states - middle) / step.masked_fill(step == 0, 1)).round().clamp(-128, 127)
        return codes * step + middle


@dataclass(frozen=True)
class Int4PerToken(PerToken):
    """Codes 0 to 15 between the extremes of each token and head; an integer zero point lies in its float32 scale."""

    code_bits: ClassVar[int] = 4

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        least, largest = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
        step = ((largest - least) / 15).clamp_min(1e-6)
        zero = (-least / step).round().clamp(0, 15)
        return ((states / step + zero).round().clamp(0, 15) - zero) * step


@dataclass(frozen=True)
class MlxAffine(StateFormat):
    """MLX's `mx.quantize`: groups of a head from the extreme of the larger magnitude, on a grid that has zero.

    Attributes:
        name: its name.
        code_bits: 2, 4 or 8.
        group_size: elements of a group: 32, 64 or 128.
    """

    name: str
    code_bits: int
    group_size: int

    @property
    def groups(self) -> str:  # type: ignore[override]  # from the size
        """The group size in words."""
        return f"{self.group_size} elements of a head"

    def bits(self, head_dim: int) -> float:
        """Return the codes, with scale and bias in 16 bits each."""
        del head_dim
        return self.code_bits + 32 / self.group_size

    def fits(self, head_dim: int) -> bool:
        """Return whether heads are made of whole groups."""
        return head_dim % self.group_size == 0

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        groups = states.unflatten(-1, (-1, self.group_size))
        least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        is_low = least.abs() > largest.abs()
        width = ((largest - least) / (2**self.code_bits - 1)).clamp_min(1e-7)
        step, edge = torch.where(is_low, width, -width), torch.where(is_low, least, largest)
        count = (edge / step).round()
        has_zero = count != 0
        step = torch.where(has_zero, edge / count.masked_fill(~has_zero, 1), step)
        bias = edge * has_zero
        codes = ((groups - bias) / step).round().clamp(0, 2**self.code_bits - 1)
        read: torch.Tensor = (codes * _as_half(step) + _as_half(bias)).flatten(-2)
        return read


def _as_half(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.half().float()
