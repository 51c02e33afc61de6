"""Codes of 1 to 4 bits in bytes without a wasted bit: widths of a power of two, 3 bits as 2 and 1."""

from __future__ import annotations

import torch
from torch.nn import functional

_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}


def packed_length(count: int, nbits: int) -> int:
    """Return the bytes that `count` codes take, filled up to a multiple of eight codes."""
    return -(-count // 8) * nbits


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes uint8 `[..., n]`, each below `2 ** nbits`, into uint8 `[..., packed_length(n, nbits)]`."""
    padded = functional.pad(codes, (0, -codes.shape[-1] % 8))
    planes, shift = [], nbits
    for width in _WIDTHS[nbits]:
        shift -= width
        plane = (padded >> shift) & (2**width - 1)
        fields = plane.unflatten(-1, (-1, 8 // width)) << _shifts(width, codes.device)
        planes.append(fields.sum(-1, dtype=torch.uint8))
    return torch.cat(planes, dim=-1)


def unpack(packed: torch.Tensor, count: int, nbits: int) -> torch.Tensor:
    """Return the codes uint8 `[..., count]` that `pack` was given."""
    planes = packed.split([-(-count // 8) * width for width in _WIDTHS[nbits]], dim=-1)
    codes = torch.zeros((), dtype=torch.uint8, device=packed.device)
    for width, plane in zip(_WIDTHS[nbits], planes, strict=True):
        fields = (plane.unsqueeze(-1) >> _shifts(width, packed.device)) & (2**width - 1)
        codes = (codes << width) | fields.flatten(-2)
    return codes[..., :count]


def _shifts(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)
