"""From parts in a `PackedFormat` to states, with torch alone. It must not know which quantizer wrote them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvq.plugin_api.packed_format import CHANNEL_SOURCES, PackedFormat
from kvq.store.packed_parts import read_levels, read_metadata, read_token_factors
from kvq.store.rotation import HadamardRotation

DECODE_ELEMENTS = 1 << 20
"""Elements that are decoded at a time: temporaries of more are taken from the system, and paid for, at each step."""
FLOAT16_MAX = torch.finfo(torch.float16).max


def decode_packed(
    packed: PackedFormat,
    rotation: HadamardRotation | None,
    parts: Mapping[str, torch.Tensor],
    out: torch.Tensor,
    constants: Mapping[str, torch.Tensor],
) -> None:
    """Write `scale * level + mid` into `out` `[B, H, T, D]`, rounding once to its dtype.

    In float16 a value that the error of its group carries past the largest number becomes that number.

    Args:
        packed: the format of the parts.
        rotation: what the states went through first, or None.
        parts: any run of blocks, `[B, H, blocks, *shape]`.
        out: every element is overwritten.
        constants: those of the quantizer that the format speaks of.
    """
    blocks = out.unflatten(2, (-1, packed.block_length))
    count = max(1, DECODE_ELEMENTS // max(1, blocks[:, :, :1].numel()))
    for first in range(0, blocks.shape[2], count):
        piece = slice(first, first + count)
        own = {name: part[:, :, piece] for name, part in parts.items()}
        _decode_blocks(packed, rotation, own, blocks[:, :, piece], constants)


def _decode_blocks(
    packed: PackedFormat,
    rotation: HadamardRotation | None,
    parts: Mapping[str, torch.Tensor],
    out: torch.Tensor,
    constants: Mapping[str, torch.Tensor],
) -> None:
    """Write blocks into `out` `[B, H, blocks, L, D]`."""
    is_channel_major, dtype = packed.packed_dim == -1, packed.compute_dtype
    levels = read_levels(packed, parts, constants, dtype)
    scale, mid = (spread_metadata(packed, numbers.to(dtype)) for numbers in read_metadata(packed, parts))
    states = levels.mul_(scale).add_(mid)
    factors = read_token_factors(packed, parts)
    if factors is not None:
        states *= factors.unsqueeze(-2 if is_channel_major else -1).to(dtype)
    if packed.states_dim:
        states = _sum_channels(states, constants[CHANNEL_SOURCES], packed.states_dim)
    if rotation is not None:
        states = rotation.undo(states.float(), -2 if is_channel_major else -1)
    if out.dtype is torch.float16:
        states = states.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    out.copy_(states.mT if is_channel_major else states)


def _sum_channels(states: torch.Tensor, sources: torch.Tensor, count: int) -> torch.Tensor:
    """Return `[B, H, blocks, count, L]`, the sums of the channels of `[B, H, blocks, D, L]` by their sources."""
    index = sources.long()[None, :, None, :, None].expand(states.shape)
    return states.new_zeros((*states.shape[:3], count, states.shape[-1])).scatter_add_(3, index, states)


def spread_metadata(packed: PackedFormat, metadata: torch.Tensor) -> torch.Tensor:
    """Return scales or mids as they meet the codes."""
    is_channel_major = packed.packed_dim == -1
    if packed.per_channel:
        return metadata.unsqueeze(-1 if is_channel_major else -2)
    spread = metadata.repeat_interleave(packed.group_length, dim=-1)[..., : packed.head_dim]
    return spread.mT if is_channel_major else spread
