"""Codes of 1 to 8 bits in bytes, without a wasted bit.

A width that divides 8 is stored in one plane, the others in several (7 = 4 + 2 + 1), lowest bits first. Within a plane
the codes of one block are packed split-half: with four bits, byte `i` holds code `i` in its low and code `i + L / 2` in
its high part, so a kernel that reads low and high parts reads two runs of neighbours.
"""

from __future__ import annotations

import torch

_PLANE_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths, in bits, of the planes that hold codes of `bits` bits, lowest bits first."""
    return _PLANE_WIDTHS[bits]


def split_planes(codes: torch.Tensor, bits: int) -> dict[int, torch.Tensor]:
    """Split codes into planes by width.

    Args:
        codes: uint8, each below `2 ** bits`.
        bits: 1 to 8.

    Returns:
        For each width a uint8 tensor of the shape of `codes`, each value below `2 ** width`.
    """
    planes, shift = {}, 0
    for width in plane_widths(bits):
        planes[width] = (codes >> shift) & (2**width - 1)
        shift += width
    return planes


def join_planes(planes: dict[int, torch.Tensor]) -> torch.Tensor:
    """Undo `split_planes`; the planes in the order in which it returned them."""
    (shift, codes), *others = planes.items()
    for width, plane in others:
        codes = codes | (plane << shift)
        shift += width
    return codes


def pack(plane: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Pack one plane along `dim`, whose size L is a multiple of `8 / width`.

    Args:
        plane: uint8, each value below `2 ** width`.
        width: 1, 2, 4 or 8 bits.
        dim: the dimension to pack along.

    Returns:
        uint8 with `L * width / 8` instead of L; for 8 bits `plane` itself.
    """
    parts = plane.chunk(8 // width, dim=dim)
    packed = parts[0]
    for position, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (width * position))
    return packed


def unpack(packed: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Undo `pack`; for 8 bits the result is `packed` itself."""
    if width == 8:
        return packed
    mask = 2**width - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, width)], dim=dim)
