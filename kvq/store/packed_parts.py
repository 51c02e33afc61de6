"""Reading parts in a `PackedFormat` with torch alone. It must not know which quantizer wrote them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvq.plugin_api.packed_format import CODEBOOK, PackedFormat
from kvq.plugin_api.packing import join_planes, unpack
from kvq.store.balance import read_factors
from kvq.store.byte_metadata import read_bytes


def read_levels(
    layout: PackedFormat,
    parts: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return what codes stand for before scale and mid, new: `code - 2 ** (bits - 1)`, or the number of the codebook.

    `[B, H, blocks, D, L]` for keys, `[B, H, blocks, L, D]` for values.
    """
    planes = {width: unpack(parts[f"codes_{width}"], width, layout.packed_dim) for width in layout.plane_widths}
    codes = join_planes(planes)
    if layout.has_codebook:
        return constants[CODEBOOK].to(dtype)[codes.int()]
    return codes.to(dtype).sub_(2 ** (layout.bits - 1))


def read_metadata(layout: PackedFormat, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and mid in fp32: `[B, H, blocks, D]` per channel, `[B, H, blocks, L, groups]` per token."""
    if layout.has_units:
        return read_bytes(parts["scale"], parts["mid"], parts["units"])
    scale = parts["scale"].float()
    mid = torch.zeros_like(scale) if layout.mid_dtype is None else parts["mid"].float()
    if layout.has_exponent:
        exponent = parts["exponent"].to(torch.int32).reshape(*scale.shape[:3], *[1] * (scale.dim() - 3))
        scale = torch.ldexp(scale, exponent)
        mid = torch.ldexp(mid, exponent) if layout.shifts_mid else mid
    return scale, mid


def read_token_factors(layout: PackedFormat, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what each token is to be multiplied by, fp32 `[B, H, blocks, L]`, or None: nothing."""
    return read_factors(parts["factor"]) if layout.has_factor else None
