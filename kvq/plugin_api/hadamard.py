"""The Hadamard transform of the last elements of a head, in steps of one addition for each element."""

from __future__ import annotations

import torch


def hadamard_block(length: int) -> int:
    """Return the elements of one transform: the largest power of two that divides `length`, at least 1."""
    return length & -length


def hadamard_transform(states: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Multiply blocks along a dimension by the orthonormal Hadamard matrix (Sylvester's), which is its own inverse.

    It adds and subtracts in float32 where the dtype is narrower, and rounds once at the end: sums of float16 would be
    infinite where the result is not. A result past the largest number of the dtype is infinite.

    A length that is no power of two is transformed in blocks of `hadamard_block(length)` elements; an odd one stays as
    it is.

    Args:
        states: floating-point, any shape; along `dim` at least one element; not written to.
        dim: -1 or -2.

    Returns:
        A new tensor of the shape, dtype and device of `states`.

    Raises:
        ValueError: `dim` is neither -1 nor -2.
        TypeError: `states` is not floating-point.

    The transform of rotation-based quantizers, there behind random signs (QuIP#, arXiv 2402.04396; QuaRot, arXiv
    2404.00456). Multiply by signs of your own first: without them a constant vector ends in one element.
    """
    if dim not in (-1, -2):
        raise ValueError(f"dim={dim!r} is not supported; choose -1 or -2")
    if not states.is_floating_point():
        raise TypeError(f"states of {states.dtype} have no transform; give floating-point ones")
    block = hadamard_block(states.shape[dim])
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    transformed: torch.Tensor = add_and_subtract(wide, block, dim) * block**-0.5
    return transformed.to(states.dtype)


def add_and_subtract(states: torch.Tensor, block: int, dim: int = -1) -> torch.Tensor:
    """Return blocks of `dim`, -1 or -2, times a matrix of 1 and -1: the transform before it is scaled; may alias."""
    blocks: torch.Tensor = states.unflatten(dim, (-1, block))
    steps = block.bit_length() - 1
    if states.requires_grad:  # autograd wants each step to have a room of its own
        for _ in range(steps):
            first, second = _neighbours(blocks, dim)
            blocks = torch.cat([first + second, first - second], dim=dim)
    elif steps:
        blocks = _add_in_turn(blocks, dim, steps)
    return blocks.flatten(dim - 1, dim)


def _add_in_turn(blocks: torch.Tensor, dim: int, steps: int) -> torch.Tensor:
    """Replace neighbours along `dim` by their sums, then their differences, `steps` times, in two rooms in turn."""
    rooms = [torch.empty_like(blocks) for _ in range(min(2, steps))]
    # Views take as long as sums where there are few tokens: they are made once a room.
    sources, halves = [_neighbours(room, dim) for room in rooms], [room.chunk(2, dim=dim) for room in rooms]
    first, second = _neighbours(blocks, dim)
    for step in range(steps):
        low, high = halves[step % 2]
        torch.add(first, second, out=low)
        torch.sub(first, second, out=high)
        first, second = sources[step % 2]
    return rooms[(steps - 1) % 2]


def _neighbours(blocks: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every other element along `dim`, and those between."""
    pairs = blocks.unflatten(dim, (-1, 2))
    return pairs.select(dim, 0), pairs.select(dim, 1)
