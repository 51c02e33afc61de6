"""Where the chunks of a layer lie, in the structures of the kernel: the same from step to step.

Owns the addresses and keeps alive what they point to. They are good until the store of either side changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from kvq.attention.handle import PackedPair
from kvq.attention.kernels.compiled.call_fields import CallFields
from kvq.attention.kernels.compiled.structures import TYPE_NUMBERS, PackedRequest, PackedSegment, PackedSide
from kvq.errors import QuantizerContractError
from kvq.plugin_api.packed_format import CHANNEL_SOURCES, ROTATION_SIGNS, PackedFormat, get_packed_format
from kvq.store.balance import FACTORS
from kvq.store.chunks import StoreView
from kvq.store.declared_format import are_signs, are_sources, get_codebook
from kvq.store.segments import Segment


@dataclass
class StoreAddresses:
    """The request of a layer with everything filled in that its store decides.

    Attributes:
        request: the structure; the caller writes the fields that change from call to call.
        place: address of the structure.
        call: writes most of these fields.
        items: pieces of work, one for each key-value head of each row of the batch.
        tiles: tiles of stored tokens.
        stores: the stores of keys and values that the addresses point into.
        starts: positions of the first real tokens, as a tuple and as the array that the request points to.
        kept: other objects that must live as long.
    """

    request: PackedRequest
    place: int
    call: CallFields
    items: int
    tiles: int
    stores: tuple[StoreView, StoreView]
    starts: tuple[tuple[int, ...], Any]
    kept: tuple[Any, ...]

    @classmethod
    def of(cls, pair: PackedPair) -> StoreAddresses:
        """Return the addresses of a layer whose two quantizers have a packed format."""
        request = PackedRequest()
        kept = (_fill_side(request.key, pair.key.store), _fill_side(request.value, pair.value.store))
        like = pair.key.like
        request.batch, request.heads = like.shape[:2]
        request.stored = pair.key.store.length
        request.tile_length = lcm(request.key.block_length, request.value.block_length)
        starts = pair.key.sinks.starts
        array = (ctypes.c_int64 * len(starts))(*starts)
        request.sink_starts = ctypes.addressof(array)
        return cls(
            request,
            ctypes.addressof(request),
            CallFields(request),
            items=request.batch * request.heads,
            tiles=request.stored // request.tile_length,
            stores=(pair.key.store, pair.value.store),
            starts=(starts, array),
            kept=kept,
        )

    def serve(self, pair: PackedPair) -> bool:
        """Return whether they still describe what the pair holds."""
        keys, values = self.stores
        return keys is pair.key.store and values is pair.value.store and self.starts[0] == pair.key.sinks.starts


def _fill_side(side: PackedSide, store: StoreView) -> Any:
    packed = get_packed_format(store.codec)
    widths = packed.plane_widths
    side.head_dim, side.block_length, side.group_length = packed.head_dim, packed.block_length, packed.group_length
    side.states_dim = packed.states_dim or packed.head_dim
    side.per_channel = packed.per_channel
    side.groups = 1 if packed.per_channel else packed.groups_per_token
    side.bits, side.plane_count = packed.bits, len(widths)
    side.widths[: len(widths)] = widths
    side.scale_type = TYPE_NUMBERS[packed.scale_dtype]
    if packed.mid_dtype is not None:
        side.mid_type = TYPE_NUMBERS[packed.mid_dtype]
    side.shifts_mid = packed.shifts_mid
    constants = store.codec.constants()  # a quantizer may make them for each call
    _fill_constants(side, packed, constants)
    side.segment_count = len(store.segments)
    array = (PackedSegment * max(1, len(store.segments)))()
    for described, segment in zip(array, store.segments, strict=False):
        _fill_segment(described, segment, widths)
    side.segments = array
    return array, constants


def _fill_constants(side: PackedSide, packed: PackedFormat, constants: Mapping[str, torch.Tensor]) -> None:
    side.factors = FACTORS.numbers.data_ptr()
    if packed.rotation_block:
        side.signs, side.rotation_block = _get_signs(packed, constants).data_ptr(), packed.rotation_block
    if packed.has_codebook:
        side.levels = get_codebook(packed, constants).data_ptr()
    if packed.states_dim:
        side.sources = _get_sources(packed, constants).data_ptr()


def _get_signs(packed: PackedFormat, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    signs = constants[ROTATION_SIGNS]
    if not are_signs(signs, packed.head_dim):
        raise QuantizerContractError(f"{ROTATION_SIGNS!r} is not int8 [{packed.head_dim}] and contiguous")
    return signs


def _get_sources(packed: PackedFormat, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the constant that compiled code reads memory by; it may come from a file."""
    sources = constants[CHANNEL_SOURCES]
    if not sources.is_contiguous() or not are_sources(sources, packed.states_dim):
        raise QuantizerContractError(
            f"{CHANNEL_SOURCES!r} is not contiguous, or leads to elements that a head of {packed.states_dim} lacks"
        )
    return sources


def _fill_segment(packed: PackedSegment, segment: Segment, widths: tuple[int, ...]) -> None:
    for place, width in enumerate(widths):
        packed.planes[place] = segment.parts[f"codes_{width}"].data_ptr()
    packed.scale = segment.parts["scale"].data_ptr()
    if "mid" in segment.parts:
        packed.mid = segment.parts["mid"].data_ptr()
    if "exponent" in segment.parts:
        packed.exponent = segment.parts["exponent"].data_ptr()
    if "units" in segment.parts:
        packed.units = segment.parts["units"].data_ptr()
    if "factor" in segment.parts:
        packed.factor = segment.parts["factor"].data_ptr()
    if segment.rows is not None:
        packed.rows = segment.rows.data_ptr()
    packed.used, packed.capacity = segment.used, segment.capacity
