"""TurboQuant as a `Quantizer`: vectors in blocks, at a fractional rate with more bits for channels that need them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvq.plugin_api import Part, clamp_to_dtype, pack_codes, packed_length, unpack_codes
from kvq_turboquant.vector_code import VectorCode

BLOCK_LENGTH = 32


class TurboQuantizer:
    """Quantizes each token's vector by itself.

    At a fractional rate such as 2.5 the channels are split block by block: those with the most energy, the outliers,
    make one vector at 3 bits, the others one at 2, each with its own rotation and length. The choice is stored as one
    bit per channel and block; nothing has to be calibrated.

    Args:
        head_dim: elements of a vector, D.
        nbits: bits per element, whole or fractional.
        device: device of the states.
        inner_product: see `VectorCode`.
        seed: seed of the random matrices.
    """

    block_length = BLOCK_LENGTH
    group_local = True

    def __init__(
        self, head_dim: int, nbits: float, device: torch.device, *, inner_product: bool = False, seed: int = 0
    ) -> None:
        self.head_dim = head_dim
        self.outliers = round((nbits - math.floor(nbits)) * head_dim)
        sizes = {"outlier": (self.outliers, math.ceil(nbits)), "plain": (head_dim - self.outliers, math.floor(nbits))}
        self.codes = {
            name: VectorCode(count, bits, BLOCK_LENGTH, device, inner_product=inner_product, seed=seed)
            for name, (count, bits) in sizes.items()
            if count
        }

    def __deepcopy__(self, memo: dict[int, object]) -> TurboQuantizer:
        """Return the quantizer itself: nothing in it ever changes."""
        return self

    def layout(self) -> Mapping[str, Part]:
        """Return lengths and packed codes, and at a fractional rate the mask of the outlier channels."""
        parts = {f"{name}_{part}": one for name, code in self.codes.items() for part, one in code.layout().items()}
        if self.outliers:
            parts["outlier_mask"] = Part((packed_length(self.head_dim, 1),), torch.uint8)
        return parts

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return rotations and codebooks; quantizers for vectors of one length share them."""
        return {f"{name}_{key}": one for name, code in self.codes.items() for key, one in code.constants().items()}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize `[B, H, T, D]`, T a multiple of the block length; the parts never alias the input."""
        blocks = states.float().contiguous().unflatten(2, (-1, BLOCK_LENGTH))
        if not self.outliers:
            return _name("plain", self.codes["plain"].encode(blocks))
        mask = self._find_outliers(blocks)
        outliers, plain = _part_channels(blocks, mask, self.outliers)
        return {
            "outlier_mask": pack_codes(mask.to(torch.uint8), 1),
            **_name("outlier", self.codes["outlier"].encode(outliers)),
            **_name("plain", self.codes["plain"].encode(plain)),
        }

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the vectors into `out` `[B, H, T, D]`, rounding once; a number past the largest becomes that."""
        decoded = [code.decode(_unname(name, parts)) for name, code in self.codes.items()]
        blocks = torch.cat(decoded, dim=-1)
        if self.outliers:
            mask = unpack_codes(parts["outlier_mask"], 1, self.head_dim)
            blocks = blocks.gather(-1, _order(mask).argsort(-1).unsqueeze(-2).expand_as(blocks))
        out.unflatten(2, (-1, BLOCK_LENGTH)).copy_(clamp_to_dtype(blocks, out.dtype))

    def _find_outliers(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return bool `[B, H, blocks, D]`: the channels with the largest energy, the first ones where equal."""
        largest = blocks.abs().amax((-1, -2), keepdim=True)
        energy = (blocks / largest.masked_fill(largest == 0, 1)).square().sum(-2)
        chosen = energy.argsort(dim=-1, descending=True, stable=True)[..., : self.outliers]
        return torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, chosen, True)


def _part_channels(blocks: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` channels of `[B, H, blocks, L, D]` that the mask chooses, and the others, both in order."""
    parted = blocks.gather(-1, _order(mask).unsqueeze(-2).expand_as(blocks))
    return parted[..., :count].contiguous(), parted[..., count:].contiguous()


def _order(mask: torch.Tensor) -> torch.Tensor:
    """Return the channels with the chosen ones first, int64 `[..., D]`."""
    return mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def _name(prefix: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}_{name}": part for name, part in parts.items()}


def _unname(prefix: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}_"): part for name, part in parts.items() if name.startswith(f"{prefix}_")}
