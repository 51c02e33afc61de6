"""float8 with a scale per token or per channel, as a `Quantizer`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvq.plugin_api import Granularity, Part, clamp_to_dtype

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALE_DTYPE = torch.bfloat16
"""Dtype of the scales: it has the range of all dtypes of states; codes are made with the rounded scale."""
PER_TOKEN_BLOCK_LENGTH = 32


class Float8Quantizer:
    """Divides states by a scale that brings the largest one of its group to the end of float8, and rounds.

    Args:
        format: `e4m3` or `e5m2`.
        granularity: per token, a scale for the vector of one token; per channel, one for the channel within a block.
        head_dim: elements of a vector, D.
        group_length: tokens of a block, per channel.
    """

    group_local = True

    def __init__(self, format: str, granularity: Granularity, head_dim: int, group_length: int) -> None:  # noqa: A002
        self.dtype = FORMATS[format]
        self.head_dim = head_dim
        self.per_channel = granularity is Granularity.PER_CHANNEL
        self.block_length = group_length if self.per_channel else PER_TOKEN_BLOCK_LENGTH

    def layout(self) -> Mapping[str, Part]:
        """Return the codes and the scales of one block."""
        scales = self.head_dim if self.per_channel else self.block_length
        return {
            "codes": Part((self.block_length, self.head_dim), self.dtype),
            "scale": Part((scales,), SCALE_DTYPE),
        }

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return nothing: the scales are stored with the codes."""
        return {}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize `[B, H, T, D]`; a group with an element that is not finite becomes NaN as a whole."""
        blocks = states.float().unflatten(2, (-1, self.block_length))
        largest = blocks.abs().amax(-2 if self.per_channel else -1)
        limit = torch.finfo(self.dtype).max
        scale = (largest / limit).to(SCALE_DTYPE)
        divisor = self._spread(scale.float().masked_fill(scale == 0, 1))
        codes = clamp_to_dtype(blocks / divisor, self.dtype).to(self.dtype)
        return {"codes": codes, "scale": scale.masked_fill(~scale.isfinite(), math.nan)}

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write code times scale into `out` `[B, H, T, D]`; a number past the dtype's largest one becomes that."""
        states = parts["codes"].float() * self._spread(parts["scale"].float())
        out.unflatten(2, (-1, self.block_length)).copy_(clamp_to_dtype(states, out.dtype))

    def _spread(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.unsqueeze(-2 if self.per_channel else -1)
