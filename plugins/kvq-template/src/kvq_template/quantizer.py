"""Symmetric absmax rounding."""

from __future__ import annotations

import torch


class TemplateQuantizer:
    """Rounds each group to `2 ** nbits - 1` levels that are symmetric about zero.

    Args:
        nbits: bits per code, at least 2.
        clip: share of the largest magnitude that the outermost level stands for.
    """

    group_local = True  # the codes of a group depend on that group alone

    def __init__(self, nbits: int, clip: float = 1.0) -> None:
        self.largest_code = 2 ** (nbits - 1) - 1
        self.clip = clip

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize fp32 groups `[..., G]`.

        Returns:
            codes uint8 `[..., G]`, scale fp32 `[...]` and offset fp32 `[...]`, with `x ~ scale * code + offset`.
        """
        scale = groups.abs().amax(dim=-1) * (self.clip / self.largest_code)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        levels = (groups / safe.unsqueeze(-1)).round().clamp(-self.largest_code, self.largest_code)
        return (levels + self.largest_code).to(torch.uint8), scale, -self.largest_code * scale
