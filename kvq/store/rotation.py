"""The seeded Hadamard rotation of states, which spreads outlier channels before quantization."""

from __future__ import annotations

import torch

from kvq.plugin_api.hadamard import add_and_subtract, hadamard_block


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
        self.block_size = hadamard_block(head_dim)

    @classmethod
    def of_signs(cls, signs: torch.Tensor) -> HadamardRotation:
        """Return the rotation that has these signs, int8 `[D]`, the tensor itself."""
        rotation = cls.__new__(cls)
        rotation.signs, rotation.block_size = signs, hadamard_block(len(signs))
        return rotation

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate fp32 `[..., D]`; returns a new tensor."""
        return add_and_subtract(states * self.signs, self.block_size).mul_(self.block_size**-0.5)

    def undo(self, states: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Rotate fp32 states whose heads run along `dim`, -1 or -2, back; returns a new tensor.

        Both ways give the same bits; along -2, with tokens behind, the processor adds whole vectors.
        """
        factors = self.signs.float() * self.block_size**-0.5
        rotated: torch.Tensor = add_and_subtract(states, self.block_size, dim) * (
            factors if dim == -1 else factors[:, None]
        )
        return rotated
