"""torchao's public affine primitives as an `AffineQuantizer`."""

from __future__ import annotations

import torch
from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

_LARGEST = torch.finfo(torch.float32).max
_LEAST_UNIT = 2.0**-126
"""A normal number, to keep the division by it exact."""


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
        """Quantize fp32 groups `[..., G]`, from denormal numbers to ranges past the largest fp32.

        torchao sees each group divided by a power of two, which changes no code: its own range would be infinite for
        the widest groups, and its scale has a least value.

        Returns:
            codes uint8 `[..., G]`, scale fp32 `[...]` and offset fp32 `[...]`, with `x ~ scale * code + offset`.
        """
        shape, length = groups.shape, groups.shape[-1]
        rows = groups.reshape(-1, length)
        unit = _find_unit(rows)
        rows = rows / unit[:, None]
        low = rows.new_zeros(len(rows)) if self.preserve_zero else rows.amin(-1)
        # A range that begins at zero is the one range that torchao does not widen.
        rows = rows - low[:, None]
        limits = {"quant_min": 0, "quant_max": self.largest_code}
        scale, zero_point = choose_qparams_affine(rows, MappingType.ASYMMETRIC, (1, length), torch.uint8, **limits)
        codes = quantize_affine(rows, (1, length), scale, zero_point, torch.uint8, **limits)
        scale, offset = (_times(part, unit).reshape(shape[:-1]) for part in (scale, low - scale * zero_point))
        return codes.reshape(shape), scale, offset


def _find_unit(rows: torch.Tensor) -> torch.Tensor:
    """Return the power of two at or below the largest magnitude of each row of fp32 `[N, G]`, as fp32 `[N]`."""
    largest = rows.abs().amax(-1).clamp_min(_LEAST_UNIT)
    return largest / (2 * torch.frexp(largest).mantissa)


def _times(part: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the product, fp32 `[N]`; past the largest number that."""
    return (part * unit).clamp(-_LARGEST, _LARGEST)
