"""Codes of 2 bits between the extremes of a group; kvq rotates, packs and stores them."""

from __future__ import annotations

import torch

LARGEST_CODE = 3


class PlainQuantizer:
    """Satisfies `AffineQuantizer`."""

    group_local = True

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round fp32 `[..., G]` to the nearest of four levels."""
        low, high = groups.aminmax(dim=-1)
        scale = high / LARGEST_CODE - low / LARGEST_CODE
        codes = (groups / LARGEST_CODE - low[..., None] / LARGEST_CODE) * LARGEST_CODE
        codes = codes / scale.masked_fill(scale == 0, 1)[..., None]
        return codes.round().clamp(0, LARGEST_CODE).to(torch.uint8), scale, low
