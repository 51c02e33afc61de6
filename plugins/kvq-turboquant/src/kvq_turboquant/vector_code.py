"""TurboQuant of vectors of one length at one whole number of bits (algorithms 1 and 2 of arXiv 2504.19874)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvq.plugin_api import Part, pack_codes, packed_length, unpack_codes
from kvq_turboquant.codebook import find_levels
from kvq_turboquant.random_matrices import random_projection, random_rotation

LENGTH_DTYPE = torch.bfloat16
"""Dtype of the vectors' lengths: it has the range of all dtypes of states; rounding adds 4e-6 to the relative error."""

CODES = "packed_codes"
"""The part with the codes. It was `codes` in 0.1.0, which packed them in another order: the name refuses its caches."""


class VectorCode:
    """A vector as its length, the codes of its rotated direction and, for dot products, signs of the residual.

    Args:
        dimension: elements of a vector, n.
        nbits: bits per element, 1 to 4; with `inner_product` at least 2.
        tokens: vectors of one block; products are computed block by block, to make bits independent of the batch.
        device: device of the states.
        inner_product: whether one of the bits goes to the signs of the projected residual (QJL, arXiv 2406.03482).
        seed: seed of the random matrices.
    """

    def __init__(
        self, dimension: int, nbits: int, tokens: int, device: torch.device, *, inner_product: bool, seed: int
    ) -> None:
        self.dimension = dimension
        self.tokens = tokens
        self.code_bits = nbits - 1 if inner_product else nbits
        self.rotation = random_rotation(dimension, seed, str(device))
        self.projection = random_projection(dimension, seed, str(device)) if inner_product else None
        self.levels = torch.tensor(find_levels(dimension, self.code_bits), dtype=torch.float32, device=device)

    def layout(self) -> dict[str, Part]:
        """Return the parts of one block."""
        parts = {
            "length": Part((self.tokens,), LENGTH_DTYPE),
            CODES: Part((self.tokens, packed_length(self.dimension, self.code_bits)), torch.uint8),
        }
        if self.projection is not None:
            parts["residual_length"] = Part((self.tokens,), LENGTH_DTYPE)
            parts["residual_signs"] = Part((self.tokens, packed_length(self.dimension, 1)), torch.uint8)
        return parts

    def constants(self) -> dict[str, torch.Tensor]:
        """Return rotation, codebook and, for dot products, the projection."""
        constants = {"rotation": self.rotation, "levels": self.levels}
        return constants if self.projection is None else {**constants, "projection": self.projection}

    def encode(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize fp32 `[..., tokens, n]`; a vector with an element that is not finite becomes NaN as a whole."""
        length = root_mean_square(vectors).to(LENGTH_DTYPE)
        divisor = length.float().masked_fill(length == 0, 1).unsqueeze(-1)
        rotated = _multiply(vectors / divisor, self.rotation)
        boundaries = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(rotated, boundaries)
        parts = {"length": length, CODES: pack_codes(codes.to(torch.uint8), self.code_bits)}
        if self.projection is not None:
            residual = rotated - self.levels[codes]
            signs = _multiply(residual, self.projection.T) >= 0
            parts["residual_length"] = root_mean_square(residual).to(LENGTH_DTYPE)
            parts["residual_signs"] = pack_codes(signs.to(torch.uint8), 1)
        return parts

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the vectors, fp32 `[..., tokens, n]`."""
        codes = unpack_codes(parts[CODES], self.code_bits, self.dimension)
        rotated = self.levels[codes.long()]
        if self.projection is not None:
            signs = unpack_codes(parts["residual_signs"], 1, self.dimension).float().mul_(2).sub_(1)
            # sqrt(pi / 2) / n * |r| * S^T sign(S r), with |r| = sqrt(n) times the root mean square.
            factor = math.sqrt(math.pi / (2 * self.dimension)) * parts["residual_length"].float()
            rotated = rotated + _multiply(signs, self.projection) * factor.unsqueeze(-1)
        return _multiply(rotated, self.rotation.T) * parts["length"].float().unsqueeze(-1)


def root_mean_square(vectors: torch.Tensor) -> torch.Tensor:
    """Return `|v| / sqrt(n)` without overflow, rounded down where bfloat16 would be infinite; NaN if not finite."""
    largest = vectors.abs().amax(-1, keepdim=True)
    ratio = vectors / largest.masked_fill(largest == 0, 1)
    mean = largest.squeeze(-1) * ratio.square().mean(-1).sqrt()
    lost = ~vectors.isfinite().all(-1)
    return mean.clamp(max=torch.finfo(LENGTH_DTYPE).max).masked_fill(lost, math.nan)


def _multiply(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `vectors @ matrix`, block by block: every product has the same shape in any batch, so bits agree."""
    blocks = vectors.reshape(-1, *vectors.shape[-2:])
    return torch.bmm(blocks, matrix.expand(len(blocks), *matrix.shape)).reshape(vectors.shape)
