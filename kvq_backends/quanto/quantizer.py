"""quanto's quantization of groups, as an affine quantizer.

Owns the calls into optimum.quanto and the guards around its edge cases (quanto 0.2.7). It stops at the codes: quanto's
packed tensors would compile a C++ extension at their first unpacking.
"""

from __future__ import annotations

import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8

from kvq.plugin_api import AffineQuantizer

_QTYPES = {2: qint2, 4: qint4, 8: qint8}

_CODE_OF_ZERO = 128
"""Added to an int8 code to make it unsigned."""

_LARGEST = 2.0**120
"""Magnitude from which the difference of two numbers might not be finite in fp32."""

Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes uint8 `[N, G]`, scale fp32 `[N, 1]`, offset fp32 `[N, 1]`."""


class QuantoQuantizer(AffineQuantizer):
    """Round to nearest with `MaxOptimizer` and `quanto::quantize_affine`, or `AbsmaxOptimizer` and symmetric int8.

    Args:
        nbits: 2, 4 or 8.
        symmetric_8bit: whether 8 bits use quanto's own qint8; without effect on 2 and 4 bits.
    """

    group_local = True

    def __init__(self, nbits: int, *, symmetric_8bit: bool = False) -> None:
        self.nbits = nbits
        self._encode_rows = _encode_symmetric if nbits == 8 and symmetric_8bit else self._encode_affine

    def encode(self, groups: torch.Tensor) -> Encoded:
        """Quantize groups: `x ~ scale * code + offset`.

        Args:
            groups: fp32 `[..., G]`, finite, any device; not written to, and not aliased by the results.

        Returns:
            codes: uint8 `[..., G]`, below `2 ** nbits`.
            scale: fp32 `[...]`, finite; 0 for a constant group (8 bits symmetric: for a group of zeros only).
            offset: fp32 `[...]`, finite.
        """
        rows = groups.detach().reshape(-1, groups.shape[-1])
        count = len(rows)
        if count == 1:
            # Along an axis of length 1 quanto quantizes per tensor: MaxOptimizer then returns a scale for every single
            # element, and quantize_symmetric raises. A lone group is quantized twice, which does not change its codes.
            rows = rows.expand(2, -1)
        codes, scale, offset = self._encode_rows(rows)
        leading = groups.shape[:-1]
        return codes[:count].reshape(groups.shape), scale[:count].reshape(leading), offset[:count].reshape(leading)

    def _encode_affine(self, rows: torch.Tensor) -> Encoded:
        """Spread the codes between the extremes of each row of fp32 `[N, G]`, N at least 2."""
        unit = _find_unit(rows)
        rows = rows / unit
        scale, shift = MaxOptimizer()(rows, _QTYPES[self.nbits], axis=0)
        codes = torch.ops.quanto.quantize_affine(
            rows, bits=self.nbits, axis=0, group_size=rows.shape[-1], scale=_avoid_zero(scale), shift=shift
        )
        return codes, scale * unit, -shift * unit


def _encode_symmetric(rows: torch.Tensor) -> Encoded:
    """Spread int8 codes evenly around zero for each row of fp32 `[N, G]`, N at least 2, and make them unsigned."""
    scale = AbsmaxOptimizer()(rows, qint8, axis=0)
    signed = torch.ops.quanto.quantize_symmetric(rows, dtype=torch.int8, axis=0, scale=_avoid_zero(scale))
    codes = (signed.to(torch.int16) + _CODE_OF_ZERO).to(torch.uint8)
    return codes.masked_fill(scale == 0, 0), scale, -_CODE_OF_ZERO * scale


def _avoid_zero(scale: torch.Tensor) -> torch.Tensor:
    """Return `scale` with 1 for 0: quanto would divide 0 by 0 and cast nan to an integer; by 1 the code is 0."""
    return scale.masked_fill(scale == 0, 1.0)


def _find_unit(rows: torch.Tensor) -> torch.Tensor:
    """Return a power of two for each row, fp32 `[N, 1]`, in which its range is finite: 1 but for enormous states."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    return torch.ones_like(largest).masked_fill(largest > _LARGEST, 2.0**8)
