"""The seeded Hadamard rotation of states, which spreads outlier channels before quantization."""

from __future__ import annotations

import torch


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
        self.block_size = head_dim & -head_dim

    @classmethod
    def of_signs(cls, signs: torch.Tensor) -> HadamardRotation:
        """Return the rotation that has these signs, int8 `[D]`, the tensor itself."""
        rotation = cls.__new__(cls)
        rotation.signs, rotation.block_size = signs, len(signs) & -len(signs)
        return rotation

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate fp32 `[..., D]`; returns a new tensor."""
        return self._transform(states * self.signs)

    def undo(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate fp32 `[..., D]` back; returns a new tensor."""
        return self._transform(states) * self.signs

    def _transform(self, states: torch.Tensor) -> torch.Tensor:
        blocks: torch.Tensor = states.unflatten(-1, (-1, self.block_size))
        span = 1
        while span < self.block_size:
            pairs = blocks.unflatten(-1, (-1, 2, span))
            low, high = pairs.select(-2, 0), pairs.select(-2, 1)
            blocks = torch.stack([low + high, low - high], dim=-2).flatten(-3)
            span *= 2
        scale: float = self.block_size**-0.5
        return blocks.flatten(-2) * scale
