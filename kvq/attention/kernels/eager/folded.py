"""Dot products with packed states: scales are folded into the small operand, and the codes stay codes.

Both classes satisfy `FusedScores` for one side of one layer: `FoldedAffine` for a quantizer with a `PackedFormat`, and
`DecodedBlocks` for any other, whose blocks are decoded a few at a time. Everything is computed in fp32.

The query heads that share a key-value head are handed over as R queries of one head: the query is `[B, H, R, D]`, the
probabilities are `[B, H, R, T]`. A backend's own `FusedScores` is called in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from kvq.plugin_api.packed_format import CHANNEL_SOURCES, ROTATION_SIGNS, PackedFormat, find_packed_format
from kvq.plugin_api.quantizer import FusedScores, Quantizer
from kvq.store.packed_parts import read_levels, read_metadata, read_token_factors
from kvq.store.rotation import HadamardRotation

_FUSED_METHODS = ("prepare_query", "scores", "mix", "finish_output")


def find_fused(quantizer: Quantizer, head_dim: int) -> FusedScores:
    """Return an object that computes attention on a quantizer's packed form: the quantizer itself, or one of ours."""
    packed = find_packed_format(quantizer)
    if packed is not None:
        return FoldedAffine(packed, quantizer.constants())
    if all(callable(getattr(quantizer, name, None)) for name in _FUSED_METHODS):
        return cast(FusedScores, quantizer)
    return DecodedBlocks(quantizer, head_dim)


class FoldedAffine:
    """`q . K = (q * scale) . level + q . mid` and `p . V = (p * scale) . level + p . mid`.

    A level is what a code stands for: itself less the middle of its range, or a number of a codebook.

    Where tokens have factors, a key's product is multiplied by its own, and so is the probability of a value.

    Args:
        packed: the side's format.
        constants: the quantizer's constants.
    """

    def __init__(self, packed: PackedFormat, constants: Mapping[str, torch.Tensor]) -> None:
        self.packed, self.constants = packed, constants
        self.rotation = HadamardRotation.of_signs(constants[ROTATION_SIGNS]) if packed.rotation_block else None
        self.sources = constants[CHANNEL_SOURCES].long() if packed.states_dim else None

    def prepare_query(self, query: torch.Tensor) -> torch.Tensor:
        """Return `query` as the keys are stored: fp32, rotated, an element for each stored channel."""
        query = query.float()
        if self.sources is not None:
            return query.gather(-1, self.sources[None, :, None].expand(*query.shape[:3], -1))
        return query if self.rotation is None else self.rotation.apply(query)

    def scores(self, query: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return dot products `[B, H, R, T]` of a prepared query `[B, H, R, D]` with the keys in `parts`."""
        levels = read_levels(self.packed, parts, self.constants)
        scale, mid = read_metadata(self.packed, parts)
        query = query[:, :, None]
        if self.packed.per_channel:
            products = (query * scale.unsqueeze(-2)) @ levels
            products += query @ mid.unsqueeze(-1)
        else:
            products = levels.new_zeros((*levels.shape[:3], query.shape[-2], levels.shape[-1]))
            length = self.packed.group_length
            pairs = zip(query.split(length, dim=-1), levels.split(length, dim=-2), strict=True)
            for group, (query_part, level_part) in enumerate(pairs):
                products += (query_part @ level_part) * scale[..., None, :, group]
                products += query_part.sum(-1, keepdim=True) * mid[..., None, :, group]
        factors = read_token_factors(self.packed, parts)
        if factors is not None:
            products *= factors.unsqueeze(-2)
        return products.transpose(2, 3).flatten(-2)

    def mix(self, probabilities: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return `[B, H, R, D]`, the values in `parts` weighted by `probabilities` `[B, H, R, T]`."""
        levels = read_levels(self.packed, parts, self.constants)
        scale, mid = read_metadata(self.packed, parts)
        weights = probabilities.unflatten(-1, (-1, self.packed.block_length)).transpose(2, 3)
        factors = read_token_factors(self.packed, parts)
        if factors is not None:
            weights = weights * factors.unsqueeze(-2)
        if self.packed.per_channel:
            mixed = (weights @ levels) * scale.unsqueeze(-2) + weights.sum(-1, keepdim=True) * mid.unsqueeze(-2)
        else:
            pieces = []
            for group, level_part in enumerate(levels.split(self.packed.group_length, dim=-1)):
                folded = weights * scale[..., None, :, group]
                pieces.append(folded @ level_part + weights @ mid[..., :, group, None])
            mixed = torch.cat(pieces, dim=-1)
        total: torch.Tensor = mixed.sum(2)
        return total

    def finish_output(self, mixed: torch.Tensor) -> torch.Tensor:
        """Rotate the sum back."""
        return mixed if self.rotation is None else self.rotation.undo(mixed)


class DecodedBlocks:
    """Decodes the blocks that it is given and computes with the states; the caller gives few at a time.

    Args:
        quantizer: the side's quantizer.
        head_dim: the side's D.
    """

    def __init__(self, quantizer: Quantizer, head_dim: int) -> None:
        self.quantizer = quantizer
        self.head_dim = head_dim

    def prepare_query(self, query: torch.Tensor) -> torch.Tensor:
        """Return `query` in fp32."""
        return query.float()

    def scores(self, query: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return dot products `[B, H, R, T]` of a query `[B, H, R, D]` with the keys in `parts`."""
        return query @ self._decode(parts).transpose(-1, -2)

    def mix(self, probabilities: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return `[B, H, R, D]`, the values in `parts` weighted by `probabilities` `[B, H, R, T]`."""
        return probabilities @ self._decode(parts)

    def finish_output(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return the sum as it is."""
        return mixed

    def _decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        batch, heads, blocks = next(iter(parts.values())).shape[:3]
        shape = (batch, heads, blocks * self.quantizer.block_length, self.head_dim)
        states = torch.empty(shape, dtype=torch.float32, device=next(iter(parts.values())).device)
        self.quantizer.decode_into(parts, states)
        return states
