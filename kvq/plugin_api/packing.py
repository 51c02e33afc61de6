"""Codes of 1 to 8 bits in bytes, without a wasted bit.

A width that divides 8 is stored in one plane, the others in several (7 = 4 + 2 + 1), lowest bits first. Within a plane
the codes of one block are packed split-half: with four bits, byte `i` holds code `i` in its low and code `i + L / 2` in
its high part, so a kernel that reads low and high parts reads two runs of neighbours.
"""

from __future__ import annotations

import torch
from torch.nn import functional

MULTIPLE = 8
"""Codes are filled up to a multiple of this: whole bytes at every width."""
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


def packed_length(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take, filled up to a multiple of eight codes.

    Raises:
        ValueError: `bits` is not 1 to 8.
    """
    return -(-count // MULTIPLE) * sum(_get_widths(bits))


def pack_codes(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Pack codes of any width along a dimension, without a wasted bit: the planes of `PackedFormat`, one by one.

    Args:
        codes: uint8, any shape, each below `2 ** bits` (higher bits are dropped); along `dim` it is filled up with
            zeros to a multiple of eight codes. Not written to.
        bits: bits per code, 1 to 8.
        dim: the dimension to pack along.

    Returns:
        uint8 with `packed_length(n, bits)` bytes along `dim` in the place of n codes; never an alias of `codes`.

    Raises:
        ValueError: `bits` is not 1 to 8.
        TypeError: `codes` is not uint8.
    """
    widths = _get_widths(bits)
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes of {codes.dtype} cannot be packed; give them as torch.uint8")
    missing = -codes.shape[dim] % MULTIPLE
    filled = functional.pad(codes.movedim(dim, -1), (0, missing)).movedim(-1, dim) if missing else codes
    planes = split_planes(filled, bits)
    return torch.cat([pack(planes[width], width, dim) for width in widths], dim=dim)


def unpack_codes(packed: torch.Tensor, bits: int, count: int, dim: int = -1) -> torch.Tensor:
    """Return the codes that `pack_codes` was given.

    Args:
        packed: uint8, with `packed_length(count, bits)` bytes along `dim`.
        bits: bits per code, 1 to 8.
        count: codes along `dim`.
        dim: the dimension that was packed.

    Returns:
        uint8 with `count` codes along `dim`; at 8 bits it may be a view of `packed`.

    Raises:
        ValueError: `bits` is not 1 to 8, or there are not so many bytes along `dim`.
    """
    widths = _get_widths(bits)
    expected = packed_length(count, bits)
    if packed.shape[dim] != expected:
        raise ValueError(f"{count} codes of {bits} bits take {expected} bytes, not {packed.shape[dim]}")
    planes = packed.split([expected * width // bits for width in widths], dim=dim)
    codes = join_planes({width: unpack(plane, width, dim) for width, plane in zip(widths, planes, strict=True)})
    return codes.narrow(dim, 0, count)


def _get_widths(bits: int) -> tuple[int, ...]:
    if bits not in _PLANE_WIDTHS:
        raise ValueError(f"bits={bits!r} is not supported; choose 1 to 8")
    return plane_widths(bits)
