"""The layout of packed codes that kernels of attention read by themselves, without the quantizer that wrote it.

The core's storage of affine quantizers says by an attribute `packed_format` that its codes lie so, and a general
quantizer may declare one of its own. Without it a kernel knows the blocks of a quantizer only by `decode_into`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.packing import join_planes, pack, plane_widths, split_planes, unpack
from kvq.plugin_api.quantizer import Part, QuantSpec

ROTATION_SIGNS = "rotation_signs"
"""Name of the constant of a rotated format: int8 `[D]`, the signs by which states are multiplied, then transformed."""

CHANNEL_SOURCES = "channel_sources"
"""Name of the constant of a format with `states_dim`: int32 `[H, head_dim]`, the element that a channel adds to."""

CODEBOOK = "codebook"
"""Name of the constant of a format with `has_codebook`: float32 `[2 ** bits]`, what each code stands for.

The largest of them is between 1/16 and 16,384 in size: kernels multiply in float16 too, and scales have the rest.
"""

FACTOR_STEPS = 32
"""Steps of the codes of factors, and of scales in bytes, from one power of two to the next."""
ZERO_SCALE = 255
"""The code of a scale in a byte that stands for 0."""
LOST_MID = -128
"""The code of a mid in a byte that stands for NaN."""
PER_TOKEN_BLOCK_LENGTH = 32
"""Tokens that per-token groups are packed by: a whole number of bytes at every width."""


@dataclass(frozen=True)
class PackedFormat:
    """How codes lie in the parts of a quantizer, and what they stand for.

    A stored number is `scale * (code - 2 ** (bits - 1)) + mid`, with the scale and mid of its group; with a codebook it
    is `scale * codebook[code] + mid`. A block of one head has these parts:

    - `codes_W` for each W of `plane_widths`: uint8, the codes' next W bits, lowest first, `block_length * W / 8` bytes
      for each element of a head. With `n = 8 / W` codes a byte, byte `i` holds the codes of the tokens `i`,
      `i + block_length / n`, `i + 2 * block_length / n`, ..., from its lowest bits up.
    - `scale` and `mid`: `[D]` per channel, `[block_length, groups_per_token]` per token. No `mid` where `mid_dtype` is
      None: it is 0.
    - `exponent`, where `has_exponent`: int8 `[]`; scale, and where `shifts_mid` mid too, are to be multiplied by
      `2 ** exponent`.
    - `units`, where `has_units`: fp32 `[2]`, the largest scale and the step of mids. Scale is a uint8 then, and stands
      for `units[0] * 2 ** (-scale / FACTOR_STEPS)`, or 0 where it is `ZERO_SCALE`; mid is an int8, and stands for
      `units[1] * mid`, or NaN where it is `LOST_MID`.
    - `factor`, where `has_factor`: uint8 `[block_length]`; every number of a token is to be multiplied by
      `2 ** (-factor / FACTOR_STEPS)`. Formats per channel alone have it.

    A format with `states_dim` has more channels than the states have elements: an element is the sum of all channels
    that the constant `channel_sources` leads to it. So elements of one head may have different widths: two channels of
    2 bits, one with four times the scale of the other, are one element of 4 bits.

    Attributes:
        bits: bits per code, 1 to 8.
        plane_widths: the bits of each plane of codes, which add up to `bits`.
        packed_dim: the dimension of a plane along which tokens are packed: -1 where a plane is `[D, bytes]`, as for
            keys, -2 where it is `[bytes, D]`, as for values.
        head_dim: elements of one head as they are stored (D).
        block_length: tokens of a block.
        granularity: direction of the groups. Per-channel groups are as long as a block.
        group_length: elements that share a scale and a mid; per token the last group may be shorter.
        scale_dtype: dtype of the part `scale`; uint8 where `has_units`.
        mid_dtype: dtype of the part `mid`; int8 where `has_units`; None where there is no such part.
        has_exponent: whether there is a part `exponent`.
        has_factor: whether there is a part `factor`.
        rotation_block: elements of one Hadamard transform that the states went through, after they were multiplied by
            the constant `rotation_signs`; 0 where they were not rotated.
        compute_dtype: dtype that `decode_into` computes in.
        states_dim: elements of one head of the states where these are sums of stored channels; keys alone have such. 0:
            as many as are stored.
        has_codebook: whether codes stand for the numbers of the constant `codebook`.
    """

    bits: int
    plane_widths: tuple[int, ...]
    packed_dim: Literal[-1, -2]
    head_dim: int
    block_length: int
    granularity: Granularity
    group_length: int
    scale_dtype: torch.dtype
    mid_dtype: torch.dtype | None
    has_exponent: bool
    has_factor: bool = False
    rotation_block: int = 0
    compute_dtype: torch.dtype = torch.float32
    states_dim: int = 0
    has_codebook: bool = False

    @classmethod
    def of(
        cls,
        spec: QuantSpec,
        *,
        scale_dtype: torch.dtype = torch.float16,
        mid_dtype: torch.dtype | None = torch.float16,
        has_exponent: bool = False,
        has_factor: bool = False,
        has_codebook: bool = False,
        rotation_block: int = 0,
        bits: int | None = None,
        stored_channels: int | None = None,
        block_length: int | None = None,
    ) -> PackedFormat:
        """Return the format of a general quantizer that stores codes with scales for one side of one layer.

        Unless they are given another length, blocks are as long as a group per channel, and have 32 tokens per token,
        as the core's own.

        Args:
            spec: the spec that the quantizer is built from.
            scale_dtype: float16 or float32; or uint8, with int8 for mid.
            mid_dtype: float16 or float32; int8, with uint8 for scale; or None: there are no mids.
            has_exponent: whether there is a part `exponent`; only with a scale in float16.
            has_factor: whether there is a part `factor`; only with groups per channel.
            has_codebook: whether codes stand for the numbers of the constant `codebook`.
            rotation_block: elements of one transform, where the quantizer rotates by the constant `rotation_signs`.
            bits: bits per code; default: those of the spec, rounded up.
            stored_channels: channels that are stored for a head of the spec's, if they are more; keys only.
            block_length: tokens of a block, a multiple of 8; per channel of a group too.
        """
        bits = math.ceil(spec.nbits) if bits is None else bits
        per_channel = spec.granularity is Granularity.PER_CHANNEL
        length = block_length or (spec.group_length if per_channel else PER_TOKEN_BLOCK_LENGTH)
        return cls(
            bits=bits,
            plane_widths=plane_widths(bits),
            packed_dim=-1 if spec.side == "key" else -2,
            head_dim=stored_channels or spec.head_dim,
            block_length=length,
            granularity=spec.granularity,
            group_length=length if per_channel else spec.group_length,
            scale_dtype=scale_dtype,
            mid_dtype=mid_dtype,
            has_exponent=has_exponent,
            has_factor=has_factor,
            rotation_block=rotation_block,
            has_codebook=has_codebook,
            states_dim=spec.head_dim if stored_channels else 0,
        )

    def pack(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts `codes_W` of codes uint8 `[..., L, D]`, whole blocks of L tokens, each below `2 ** bits`."""
        lying = codes.mT if self.packed_dim == -1 else codes
        planes = split_planes(lying, self.bits)
        return {f"codes_{width}": pack(plane, width, self.packed_dim) for width, plane in planes.items()}

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the codes that `pack` was given, uint8 `[..., L, D]`."""
        planes = {width: unpack(parts[f"codes_{width}"], width, self.packed_dim) for width in self.plane_widths}
        codes = join_planes(planes)
        return codes.mT if self.packed_dim == -1 else codes

    @property
    def per_channel(self) -> bool:
        """Whether a group is one channel of a block."""
        return self.granularity is Granularity.PER_CHANNEL

    @property
    def groups_per_token(self) -> int:
        """Per-token groups in one token of one head."""
        return math.ceil(self.head_dim / self.group_length)

    @property
    def rotation(self) -> str:
        """What was done to the states first, in the words of `rotation_k`: `hadamard` or `none`."""
        return "hadamard" if self.rotation_block else "none"

    @property
    def balance(self) -> str:
        """What was done to the tokens then, in the words of `balance_k`: `rms` or `none`."""
        return "rms" if self.has_factor else "none"

    @property
    def has_units(self) -> bool:
        """Whether scale and mid are bytes, whose units are a part of their own."""
        return self.mid_dtype is torch.int8

    def layout(self) -> dict[str, Part]:
        """Return the parts of one block of one head."""
        parts: dict[str, Part] = {}
        for width in self.plane_widths:
            count = self.block_length * width // 8
            shape = (self.head_dim, count) if self.packed_dim == -1 else (count, self.head_dim)
            parts[f"codes_{width}"] = Part(shape, torch.uint8)
        groups = (self.head_dim,) if self.per_channel else (self.block_length, self.groups_per_token)
        parts["scale"] = Part(groups, self.scale_dtype)
        if self.mid_dtype is not None:
            parts["mid"] = Part(groups, self.mid_dtype)
        if self.has_exponent:
            parts["exponent"] = Part((), torch.int8)
        if self.has_units:
            parts["units"] = Part((2,), torch.float32)
        if self.has_factor:
            parts["factor"] = Part((self.block_length,), torch.uint8)
        return parts

    @property
    def shifts_mid(self) -> bool:
        """Whether the exponent of a block, if there is one, belongs to mid as well."""
        return self.has_exponent and self.mid_dtype is torch.float16


def find_packed_format(quantizer: object) -> PackedFormat | None:
    """Return the format that a quantizer stores its codes in, or None where only `decode_into` can read them."""
    found = getattr(quantizer, "packed_format", None)
    return found if isinstance(found, PackedFormat) else None


def get_packed_format(quantizer: object) -> PackedFormat:
    """Return the format that a quantizer stores its codes in.

    Raises:
        TypeError: it has none.
    """
    found = find_packed_format(quantizer)
    if found is None:
        raise TypeError(f"{type(quantizer).__name__} has no packed format")
    return found
