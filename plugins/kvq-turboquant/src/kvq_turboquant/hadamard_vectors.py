"""TurboQuant in a format that kernels read: signs and a Hadamard transform for the rotation, a whole number of bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from kvq.plugin_api import Granularity, PackedFormat, Part, QuantSpec, clamp_to_dtype, hadamard_transform
from kvq_turboquant.codebook import find_levels
from kvq_turboquant.vector_code import root_mean_square

LARGEST_EXPONENT = 14
"""Of the scales of a block, once their power of two is taken out: below the largest of float16, 2 ** 16."""


class HadamardVectors:
    """Quantizes each token's vector by itself: its root mean square, and the codes of its rotated direction.

    A rotation by a Hadamard matrix behind random signs is the random rotation of most implementations (QuIP#, arXiv
    2402.04396): it takes a step for each doubling of the length, and kernels apply it to the query.

    Args:
        spec: one side of one layer; its head dim is a power of two, and its bits are whole.
        seed: seed of the signs.
    """

    group_local = True

    def __init__(self, spec: QuantSpec, seed: int) -> None:
        vectors = replace(spec, granularity=Granularity.PER_TOKEN, group_length=spec.head_dim)
        self.packed_format = PackedFormat.of(
            vectors, mid_dtype=None, has_exponent=True, has_codebook=True, rotation_block=spec.head_dim
        )
        self.block_length = self.packed_format.block_length
        with torch.inference_mode(mode=False):  # loading a cache writes into them
            self.signs = _draw_signs(spec.head_dim, seed).to(spec.device)
            levels = find_levels(spec.head_dim, self.packed_format.bits)
            self.levels = torch.tensor(levels, dtype=torch.float32, device=spec.device)

    def __deepcopy__(self, memo: dict[int, object]) -> HadamardVectors:
        """Return the quantizer itself: nothing in it ever changes."""
        return self

    def layout(self) -> Mapping[str, Part]:
        """Return codes and the length of each vector."""
        return self.packed_format.layout()

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return signs and codebook."""
        return {"codebook": self.levels, "rotation_signs": self.signs}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize `[B, H, T, D]`, T a multiple of the block length; a vector that is not finite is NaN as a whole."""
        blocks = states.float().contiguous().unflatten(2, (-1, self.block_length))
        scale = _round_to_half(root_mean_square(blocks))
        divisor = torch.ldexp(scale["scale"].float(), scale["exponent"].int().unsqueeze(-1))
        directions = blocks / divisor.masked_fill(divisor == 0, 1).unsqueeze(-1)
        rotated = hadamard_transform(directions * self.signs)
        codes = torch.bucketize(rotated, (self.levels[1:] + self.levels[:-1]) / 2)
        return {
            **self.packed_format.pack(codes.to(torch.uint8)),
            "scale": scale["scale"].unsqueeze(-1),
            "exponent": scale["exponent"],
        }

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the vectors into `out` `[B, H, T, D]`, rounding once; a number past the largest becomes that."""
        rotated = self.levels[self.packed_format.unpack(parts).int()]
        scale = torch.ldexp(parts["scale"].float(), parts["exponent"].int()[..., None, None])
        vectors = hadamard_transform(rotated) * self.signs * scale
        out.copy_(clamp_to_dtype(vectors, out.dtype).flatten(2, 3))


def _round_to_half(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return lengths fp32 `[B, H, blocks, L]` in float16, and the power of two of each block that they are over."""
    finite = lengths.nan_to_num(0)
    exponent = (torch.frexp(finite.amax(-1))[1] - LARGEST_EXPONENT).clamp(-120, 120)
    scale = torch.ldexp(lengths, -exponent.unsqueeze(-1))
    return {"scale": scale.half(), "exponent": exponent.to(torch.int8)}


def _draw_signs(dimension: int, seed: int) -> torch.Tensor:
    """Return int8 `[D]` of 1 and -1."""
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + dimension)
    ones = torch.randint(0, 2, (dimension,), generator=generator, dtype=torch.int8, device="cpu")
    return ones * 2 - 1
