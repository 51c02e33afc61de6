"""The MX formats of torchao's prototype as a `Quantizer`: 32 elements of a token share a power of two.

The prototype packs FP4 itself; FP6 it leaves one code a byte, which kvq's `pack_codes` brings to six bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from kvq.plugin_api import Part, clamp_to_dtype, pack_codes, packed_length, unpack_codes

GROUP_LENGTH = 32
"""Elements that share a power of two, by the specification."""
ELEMENTS = {4: torch.float4_e2m1fn_x2, 6: DTYPE_FP6_E2M3}
"""The format of a code for each number of bits."""


class MXQuantizer:
    """Rounds runs of 32 elements of a token to small floating-point numbers times a power of two.

    A head whose length 32 does not divide is filled up with zeros, which take their bytes.

    Args:
        head_dim: elements of a vector, D.
        nbits: 4 (E2M1) or 6 (E2M3).
        scaling: how the power of two is chosen, a name of torchao's `ScaleCalculationMode` in lower case.
    """

    block_length = 32
    group_local = True

    def __init__(self, head_dim: int, nbits: int, scaling: str) -> None:
        self.head_dim, self.nbits = head_dim, nbits
        self.length = math.ceil(head_dim / GROUP_LENGTH) * GROUP_LENGTH
        self.element, self.mode = ELEMENTS[nbits], ScaleCalculationMode[scaling.upper()]

    def layout(self) -> Mapping[str, Part]:
        """Return the packed codes of each token, and the exponents of its runs."""
        codes = Part((self.block_length, packed_length(self.length, self.nbits)), torch.uint8)
        return {"codes": codes, "exponent": Part((self.block_length, self.length // GROUP_LENGTH), torch.uint8)}

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return nothing: the exponents are stored with the codes."""
        return {}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize `[B, H, T, D]`; a run with an element that is not finite becomes NaN as a whole."""
        filled = functional.pad(states.float(), (0, self.length - self.head_dim)).contiguous()
        filled = filled.masked_fill(~filled.isfinite(), math.nan).unflatten(2, (-1, self.block_length))
        exponent, codes = to_mx(filled.flatten(0, 3), self.element, GROUP_LENGTH, self.mode)
        if self.nbits == 6:
            codes = pack_codes(codes, 6)
        shape = filled.shape[:4]
        return {"codes": codes.unflatten(0, shape), "exponent": exponent.view(torch.uint8).unflatten(0, shape)}

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write codes times powers of two into `out` `[B, H, T, D]`; a number past the largest becomes that."""
        codes, exponent = (parts[name].flatten(0, 3).contiguous() for name in ("codes", "exponent"))
        if self.nbits == 6:
            codes = unpack_codes(codes, 6, self.length).contiguous()
        states = to_dtype(codes, exponent, self.element, GROUP_LENGTH, torch.float32)
        states = states.unflatten(0, parts["codes"].shape[:4])[..., : self.head_dim].flatten(2, 3)
        out.copy_(clamp_to_dtype(states, out.dtype))
