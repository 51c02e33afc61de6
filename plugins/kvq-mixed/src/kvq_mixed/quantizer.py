"""Channels of 2 and of 4 bits in one head, stored as channels of 2 bits that add up (Kitty, arXiv 2511.18643).

A code of 4 bits is `4 * upper + lower`. So an element of 4 bits is the sum of two of 2 bits, one with four times the
scale of the other, and `PackedFormat` says which stored channels add up: kernels for codes of 2 bits read them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvq.plugin_api import PackedFormat, Part, QuantSpec, clamp_to_dtype
from kvq_mixed.channels import choose_channels, list_sources

SOURCES = "channel_sources"
"""The constant that `PackedFormat` asks for."""
NARROW_LEVELS, WIDE_LEVELS = 4, 16
CENTRE = 2
"""What the format takes off a code of 2 bits."""


class MixedQuantizer:
    """Satisfies `Quantizer` for one side of one layer: groups per channel, of `q_group_size` tokens.

    Args:
        spec: what it is built from; its statistics choose the wide channels.
        by_scores: see `choose_channels`.
    """

    group_local = True

    def __init__(self, spec: QuantSpec, *, by_scores: bool = True) -> None:
        wide = choose_channels(spec.statistics, spec.num_heads, spec.head_dim, by_scores=by_scores)
        stored = spec.head_dim + wide.shape[1]
        self.head_dim = spec.head_dim
        self.format = PackedFormat.of(spec, bits=2, stored_channels=stored)
        self.packed_format = self.format if spec.side == "key" else None
        self.block_length = self.format.block_length
        self._sources = list_sources(wide, spec.head_dim).to(spec.device)

    def layout(self) -> Mapping[str, Part]:
        """Return the parts of a block: codes, scale and middle of all stored channels."""
        return self.format.layout()

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return which channels have 4 bits, as the element that each stored channel adds to."""
        return {SOURCES: self._sources}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize whole blocks of `[B, H, T, D]`; a group with a number that is not finite becomes NaN."""
        blocks = states.float().unflatten(2, (-1, self.block_length))
        wide = self._wide.long()
        is_wide = torch.zeros(wide.shape[0], 1, self.head_dim, dtype=torch.bool, device=states.device)
        is_wide.scatter_(-1, wide[:, None], value=True)
        low, high = blocks.amin(3), blocks.amax(3)
        low = low.masked_fill(~(low.isfinite() & high.isfinite()), torch.nan)
        steps = torch.where(is_wide, WIDE_LEVELS - 1, NARROW_LEVELS - 1)
        scale = clamp_to_dtype(high / steps - low / steps, torch.float16).half().float()
        codes = _round(blocks, low, scale, steps)
        return self._split(codes, scale, low, is_wide)

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the states `[B, H, T, D]` that parts stand for."""
        codes = self.format.unpack(parts).float() - CENTRE
        states = codes * parts["scale"].float()[..., None, :] + parts["mid"].float()[..., None, :]
        whole = states[..., : self.head_dim].contiguous()
        index = self._wide.long()[None, :, None, None].expand(*whole.shape[:4], -1)
        whole.scatter_add_(-1, index, states[..., self.head_dim :])
        out.copy_(clamp_to_dtype(whole, out.dtype).flatten(2, 3))

    @property
    def _wide(self) -> torch.Tensor:
        """The wide channels `[H, C]`, as the constant says: a loaded cache has written it."""
        return self._sources[:, self.head_dim :]

    def _split(
        self, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, is_wide: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Return the parts of codes `[B, H, blocks, L, D]` of 2 and 4 bits, in channels of 2 bits."""
        wide = self._wide.long()[None, :, None].expand(*scale.shape[:3], -1)
        lower = codes.gather(-1, wide[..., None, :].expand(*codes.shape[:4], -1)) & (NARROW_LEVELS - 1)
        upper = torch.where(is_wide[:, :, None], codes >> 2, codes)
        upper_scale = torch.where(is_wide, scale * NARROW_LEVELS, scale)
        # Both halves are centred by the format; the lower one has no middle of its own.
        mid = low + CENTRE * upper_scale + torch.where(is_wide, CENTRE * scale, 0)
        lower_scale = scale.gather(-1, wide)
        return {
            **self.format.pack(torch.cat([upper, lower], dim=-1)),
            "scale": _to_half(torch.cat([upper_scale, lower_scale], dim=-1)),
            "mid": _to_half(torch.cat([mid, torch.zeros_like(lower_scale)], dim=-1)),
        }


def _round(blocks: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 `[B, H, blocks, L, D]` of the nearest levels."""
    divisor = scale.masked_fill(scale == 0, 1)[:, :, :, None]
    codes = (blocks - low[:, :, :, None]) / divisor
    return codes.round().nan_to_num(0).clamp(min=0).minimum(steps[:, :, None]).to(torch.uint8)


def _to_half(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers in float16, those past its end as the largest; NaN where they are not finite."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).masked_fill(~numbers.isfinite(), torch.nan).half()
