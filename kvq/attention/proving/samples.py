"""Requests for the trial of a kernel: random numbers, of kinds that lead through different code.

They need no backend and no model: codes, scales and states are drawn. It must not know what a kernel is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.handle import PackedPair
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.packed_format import get_packed_format
from kvq.plugin_api.quantizer import Quantizer, QuantSpec, Side
from kvq.store.affine import AffineCodec, balanced_group_length
from kvq.store.byte_metadata import LARGEST_MID
from kvq.store.flush_length import common_flush_length
from kvq.store.rotation import HadamardRotation
from kvq.store.side import LayerSide
from kvq.store.sinks import SinkTokens

SHARPNESS = 4.0
"""Factor of the scores: without one every token would weigh the same, and one that is read wrongly would not show."""


@dataclass(frozen=True)
class Sample:
    """A kind of request.

    Attributes:
        stored: tokens in the store, about; a chunk holds 2,048 at most.
        batch, heads, sharing, head_dim, queries: B, H, Hq / H, D and Tq.
        dtypes: the dtypes of query, keys and values.
        bits: bits of keys and values.
        axes: how keys and values are grouped.
        group_size: elements of a group, for both sides.
        metadata: dtype of the middles; scales are float16, and bytes beside middles of int8.
        is_rotated: whether both sides are rotated.
        balanced: whether the tokens of keys and values have factors.
        sinks: exact tokens at the start.
        mask: "bool", "additive" or "": none.
        is_reordered: whether the rows of the batch have changed places.
        softcap: as in the request.
        has_logits: whether each head has a logit without a value.
    """

    stored: int = 256
    batch: int = 1
    heads: int = 2
    sharing: int = 4
    head_dim: int = 64
    queries: int = 1
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32, torch.float32, torch.float32)
    bits: tuple[int, int] = (4, 4)
    axes: tuple[Granularity, Granularity] = (Granularity.PER_CHANNEL, Granularity.PER_TOKEN)
    group_size: int = 32
    metadata: torch.dtype = torch.float16
    is_rotated: bool = False
    balanced: tuple[bool, bool] = (False, False)
    sinks: int = 0
    mask: str = ""
    is_reordered: bool = False
    softcap: float | None = None
    has_logits: bool = False

    def build(self, device: torch.device, seed: int = 0) -> AttentionRequest:
        """Return a request of this kind; its numbers depend on the seed alone, and no other generator moves."""
        return _Builder(self, device, torch.Generator("cpu").manual_seed(seed)).build()


class _ZeroCodes:
    """An affine quantizer for blocks whose parts are drawn afterwards."""

    group_local = True

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return zeros."""
        zeros = groups.new_zeros(groups.shape[:-1])
        return torch.zeros_like(groups, dtype=torch.uint8), zeros, zeros


class _Builder:
    def __init__(self, sample: Sample, device: torch.device, generator: torch.Generator) -> None:
        self.sample, self.device, self.generator = sample, device, generator

    def build(self) -> AttentionRequest:
        sample = self.sample
        codecs = self._codec("key", 0), self._codec("value", 1)
        flush_length = common_flush_length(*codecs)
        sides = [self._side(codec, flush_length) for codec in codecs]
        for side in sides:
            self._fill(side)
        if sample.is_reordered:
            rows = torch.arange(sample.batch, device="cpu").flip(0)
            for side in sides:
                side.select_rows(rows)
        new = [self._states(sample.queries, side.dtype) for side in sides]
        views = [side.view(states) for side, states in zip(sides, new, strict=True)]
        return self._request(PackedPair(views[0], views[1], KernelCache()))

    def _fill(self, side: LayerSide) -> None:
        """Store a first chunk with the sinks, full ones, and one with room left; then some tokens in the window."""
        dtype, length, block_length = side.dtype, side.flush_length, side.codec.block_length
        first = math.ceil(max(1, self.sample.sinks) / length) * length
        side.append(self._states(first, dtype), first)
        middle = max(length, self.sample.stored - first - length) // length * length
        side.append_encoded(self._parts(side.codec, middle // block_length))
        side.append(self._states(length + 3, dtype), length)
        for segment in (side.store.segments[0], side.store.segments[-1]):
            for name, part in self._parts(side.codec, segment.used).items():
                segment.parts[name][:, :, : segment.used].copy_(part)

    def _parts(self, codec: Quantizer, blocks: int) -> dict[str, torch.Tensor]:
        """Return blocks that stand for numbers between about -2 and 2, with means that differ from group to group."""
        bits, shape = get_packed_format(codec).bits, (self.sample.batch, self.sample.heads, blocks)
        drawn = {}
        for name, part in codec.layout().items():
            if part.dtype is torch.uint8:
                options = {"dtype": torch.uint8, "generator": self.generator, "device": "cpu"}
                drawn[name] = torch.randint(256, (*shape, *part.shape), **options).to(self.device)  # type: ignore[call-overload]
            elif name == "units":
                units = torch.tensor([4 * 2.0 ** (1 - bits), 1 / LARGEST_MID], device=self.device)
                drawn[name] = self._draw(*shape, 2, dtype=torch.float32).abs().add_(0.5).mul_(units)
            elif name == "mid" and part.dtype is torch.int8:
                multiples = self._draw(*shape, *part.shape, dtype=torch.float32).mul_(LARGEST_MID / 3)
                drawn[name] = multiples.round_().clamp_(-LARGEST_MID, LARGEST_MID).to(torch.int8)
            elif name == "exponent":
                drawn[name] = self._draw(*shape, dtype=torch.float32).clamp_(-2, 2).sub_(1).to(torch.int8)
            else:
                numbers = self._draw(*shape, *part.shape, dtype=torch.float32)
                scaled = numbers.abs().add_(0.5) * 2.0 ** (1 - bits) if name == "scale" else 0.3 * numbers
                drawn[name] = scaled.to(part.dtype)
        return drawn

    def _request(self, pair: PackedPair) -> AttentionRequest:
        sample = self.sample
        query_heads = sample.heads * sample.sharing
        shape = (sample.batch, sample.queries, query_heads, sample.head_dim)
        return AttentionRequest(
            self._draw(*shape, dtype=sample.dtypes[0]).transpose(1, 2),
            pair,
            self._mask(pair.key.length),
            scaling=SHARPNESS * sample.head_dim**-0.5,
            softcap=sample.softcap,
            sink_logits=self._draw(query_heads, dtype=torch.float32) if sample.has_logits else None,
        )

    def _mask(self, length: int) -> torch.Tensor | None:
        """Return a mask that lets each query see its own token and about three of four before it."""
        sample = self.sample
        if not sample.mask:
            return None
        shape = (sample.batch, 1, sample.queries, length)
        numbers = self._draw(*shape, dtype=torch.float32)
        seen = (numbers > -0.7).tril(length - sample.queries)
        seen[..., -sample.queries :].diagonal(dim1=-2, dim2=-1).fill_(value=True)
        return seen if sample.mask == "bool" else numbers.masked_fill(~seen, -torch.inf).to(sample.dtypes[0])

    def _codec(self, side: Side, place: int) -> AffineCodec:
        sample, granularity = self.sample, self.sample.axes[place]
        per_token = granularity is Granularity.PER_TOKEN
        spec = QuantSpec(
            side=side,
            layer_idx=0,
            nbits=sample.bits[place],
            granularity=granularity,
            group_length=balanced_group_length(sample.head_dim, sample.group_size) if per_token else sample.group_size,
            num_heads=sample.heads,
            head_dim=sample.head_dim,
            states_dtype=sample.dtypes[1 + place],
            metadata_dtype=sample.metadata,
            device=self.device,
            seed=place,
        )
        rotation = HadamardRotation(sample.head_dim, place, self.device) if sample.is_rotated else None
        return AffineCodec(_ZeroCodes(), spec, rotation, torch.float32, torch.float16, balanced=sample.balanced[place])

    def _side(self, codec: AffineCodec, flush_length: int) -> LayerSide:
        sample = self.sample
        like = self._states(0, codec.spec.states_dtype)
        sinks = SinkTokens(sample.sinks, (0,) * sample.batch)
        return LayerSide.empty(codec, like=like, device=self.device, flush_length=flush_length, sinks=sinks)

    def _states(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        return self._draw(self.sample.batch, self.sample.heads, tokens, self.sample.head_dim, dtype=dtype)

    def _draw(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return drawn.to(device=self.device, dtype=dtype)
