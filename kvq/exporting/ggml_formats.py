"""The block formats of ggml that llama.cpp stores keys and values in: 32 elements of one head share a scale.

Formulas: ggml's reference quantizers (`ggml-quants.c` of ggml-org/llama.cpp), which the package `gguf` repeats in
Python. Scales and minima are float16 when they are read, float32 while codes are found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq.exporting.state_format import StateFormat

BLOCK = 32
"""Elements that share a scale."""


@dataclass(frozen=True)
class GgmlFormat(StateFormat):
    """One of q8_0, q5_1, q5_0, q4_1 and q4_0.

    Attributes:
        name: its name.
        code_bits: bits of a code.
        has_minimum: whether a block has a minimum (`_1`) beside its scale.
    """

    name: str
    code_bits: int
    has_minimum: bool
    groups: str = "32 elements of a head"

    def bits(self, head_dim: int) -> float:
        """Return codes, a float16 scale and, if there is one, a float16 minimum."""
        del head_dim
        return self.code_bits + (32 if self.has_minimum else 16) / BLOCK

    def fits(self, head_dim: int) -> bool:
        """Return whether heads are made of whole blocks."""
        return head_dim % BLOCK == 0

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read of the states."""
        blocks = states.unflatten(-1, (-1, BLOCK))
        if self.has_minimum:
            read = self._between_extremes(blocks)
        elif self.code_bits == 8:
            read = _even_sided(blocks)
        else:
            read = self._towards_largest(blocks)
        states_read: torch.Tensor = read.flatten(-2)
        return states_read

    def _between_extremes(self, blocks: torch.Tensor) -> torch.Tensor:
        """`q4_1` and `q5_1`: steps from the least element to the largest."""
        least, largest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        top = 2**self.code_bits - 1
        step = (largest - least) / top
        codes = ((blocks - least) * _inverse(step) + 0.5).floor().clamp(0, top)
        return codes * _as_half(step) + _as_half(least)

    def _towards_largest(self, blocks: torch.Tensor) -> torch.Tensor:
        """`q4_0` and `q5_0`: the element of the largest magnitude, with its sign, has the lowest code."""
        half = 2 ** (self.code_bits - 1)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        step = extreme / -half
        codes = (blocks * _inverse(step) + half + 0.5).floor().clamp(0, 2 * half - 1)
        read: torch.Tensor = (codes - half) * _as_half(step)
        return read


def _even_sided(blocks: torch.Tensor) -> torch.Tensor:
    """`q8_0`: from -127 to 127."""
    step = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(step)
    codes = torch.copysign((scaled.abs() + 0.5).floor(), scaled)  # halves go away from zero, as C's `round` does
    return codes * _as_half(step)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, torch.zeros_like(step), 1 / step)


def _as_half(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.half().float()
