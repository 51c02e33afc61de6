"""The seeded Hadamard rotation of states, which spreads outlier channels before quantization."""

from __future__ import annotations

import itertools

import torch


def rotation_block(head_dim: int) -> int:
    """Return the elements of one transform: the largest power of two that divides D."""
    return head_dim & -head_dim


class HadamardRotation:
    """Random signs, then a Hadamard matrix over blocks of the largest power of two that divides D; orthogonal.

    Args:
        head_dim: D.
        seed: decides the signs.
        device: where the signs live.

    The construction is the usual one of rotation-based quantizers (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456).
    """

    def __init__(self, head_dim: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
        self.signs = signs.to(device)
        self.block_size = rotation_block(head_dim)

    @classmethod
    def of_signs(cls, signs: torch.Tensor) -> HadamardRotation:
        """Return the rotation that has these signs, int8 `[D]`, the tensor itself."""
        rotation = cls.__new__(cls)
        rotation.signs, rotation.block_size = signs, rotation_block(len(signs))
        return rotation

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate fp32 `[..., D]`; returns a new tensor."""
        rotated: torch.Tensor = self._transform(states * self.signs) * self.block_size**-0.5
        return rotated

    def undo(self, states: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Rotate fp32 states whose heads run along `dim`, -1 or -2, back; returns a new tensor.

        Both ways give the same bits; along -2, with tokens behind, the processor adds whole vectors.
        """
        factors = self.signs.float() * self.block_size**-0.5
        rotated: torch.Tensor = self._transform(states, dim) * (factors if dim == -1 else factors[:, None])
        return rotated

    def _transform(self, states: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return blocks of `dim` times a matrix of 1 and -1, in steps of one addition for each element."""
        blocks: torch.Tensor = states.unflatten(dim, (-1, self.block_size))
        # Two buffers in turn; autograd wants each step to have its own.
        rooms = itertools.cycle([None] if states.requires_grad else [torch.empty_like(blocks) for _ in range(2)])
        for _ in range(self.block_size.bit_length() - 1):
            blocks = _add_neighbours(blocks, dim, next(rooms))
        return blocks.flatten(dim - 1, dim)


def _add_neighbours(blocks: torch.Tensor, dim: int, room: torch.Tensor | None) -> torch.Tensor:
    """Return the sums of neighbours along `dim`, then their differences, in `room` if there is one."""
    pairs = blocks.unflatten(dim, (-1, 2))
    first, second = pairs.select(dim, 0), pairs.select(dim, 1)
    if room is None:
        return torch.cat([first + second, first - second], dim=dim)
    half = blocks.shape[dim] // 2
    torch.add(first, second, out=room.narrow(dim, 0, half))
    torch.sub(first, second, out=room.narrow(dim, half, half))
    return room
