"""torchao's public affine primitives as an `AffineQuantizer`."""

from __future__ import annotations

import torch
from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine


class TorchAOQuantizer:
    """Lets torchao choose scale and zero point of each group, and round.

    Args:
        nbits: bits per code, 1 to 8.
        preserve_zero: whether the range of a group always reaches to zero, as torchao has it.
    """

    group_local = True

    def __init__(self, nbits: int, *, preserve_zero: bool = False) -> None:
        self.largest_code = 2**nbits - 1
        self.preserve_zero = preserve_zero

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize fp32 groups `[..., G]`.

        Returns:
            codes uint8 `[..., G]`, scale fp32 `[...]` and offset fp32 `[...]`, with `x ~ scale * code + offset`.
        """
        shape, length = groups.shape, groups.shape[-1]
        rows = groups.reshape(-1, length)
        low = rows.new_zeros(len(rows)) if self.preserve_zero else rows.amin(-1)
        # A range that begins at zero is the one range that torchao does not widen.
        rows = rows - low[:, None]
        limits = {"quant_min": 0, "quant_max": self.largest_code}
        scale, zero_point = choose_qparams_affine(rows, MappingType.ASYMMETRIC, (1, length), torch.uint8, **limits)
        codes = quantize_affine(rows, (1, length), scale, zero_point, torch.uint8, **limits)
        offset = low - scale * zero_point
        return codes.reshape(shape), scale.reshape(shape[:-1]), offset.reshape(shape[:-1])
