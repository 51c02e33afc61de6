"""From a codec, states and a chunk to the structure that the compiled code takes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from kvq.encoding.library import EncodeLibrary
from kvq.encoding.structure import TYPE_NUMBERS, EncodeRequest
from kvq.plugin_api.packed_format import PackedFormat
from kvq.store.affine import AffineCodec
from kvq.store.balance import FACTOR_BOUNDARIES, FACTORS, INVERSE_FACTORS
from kvq.store.byte_metadata import SCALE_BOUNDARIES

MIN_PARALLEL_ELEMENTS = 1 << 17
"""Elements below which one thread is as fast as several."""

STATES_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
METADATA_DTYPES = ({torch.float16}, {torch.float32}, {torch.float16, torch.float32}, {torch.uint8, torch.int8})


_OTHER_PARTS = {"scale", "mid", "exponent", "units", "factor"}


def is_served(packed: PackedFormat) -> bool:
    """Return whether the compiled code writes a format."""
    return {packed.scale_dtype, packed.mid_dtype} in METADATA_DTYPES and packed.block_length % 8 == 0


def describe_codec(codec: AffineCodec) -> bytes:
    """Return the bytes of a request with everything filled in that no call changes."""
    packed, request = codec.packed_format, EncodeRequest()
    widths = packed.plane_widths
    request.head_dim, request.block_length, request.group_length = (
        packed.head_dim,
        packed.block_length,
        packed.group_length,
    )
    request.per_channel, request.packs_rows = packed.per_channel, packed.packed_dim == -1
    request.groups = 1 if packed.per_channel else packed.groups_per_token
    request.bits, request.plane_count = packed.bits, len(widths)
    request.widths[: len(widths)] = widths
    if packed.rotation_block:
        request.rotation_block, request.rotation_scale = packed.rotation_block, packed.rotation_block**-0.5
    request.has_factor, request.clips = packed.has_factor, codec.clip_share < 1
    request.clip_margin = (1 - codec.clip_share) / 2
    request.scale_type, request.mid_type = TYPE_NUMBERS[packed.scale_dtype], TYPE_NUMBERS[packed.mid_dtype]
    request.has_exponent, request.shifts_mid, request.has_units = (
        packed.has_exponent,
        packed.shifts_mid,
        packed.has_units,
    )
    request.inverse_factors = INVERSE_FACTORS.numbers.data_ptr()
    request.factor_bounds = FACTOR_BOUNDARIES.numbers.data_ptr()
    request.factors = FACTORS.numbers.data_ptr()
    request.scale_bounds = SCALE_BOUNDARIES.numbers.data_ptr()
    return bytes(request)


def make_request(
    described: bytes,
    codec: AffineCodec,
    states: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    library: EncodeLibrary,
) -> EncodeRequest:
    """Return the request of one call.

    Args:
        described: what `describe_codec` returned.
        codec: the codec, whose signs the request points to.
        states: `[B, H, T, D]`, D contiguous; like all other tensors they must live until the call is over.
        parts: the parts, or room for them: contiguous, or a view for decoding, see `find_block_strides`.
        library: the compiled code.
    """
    request = EncodeRequest.from_buffer_copy(described)
    request.states, request.states_type = states.data_ptr(), TYPE_NUMBERS[states.dtype]
    request.batch_stride, request.head_stride, request.token_stride, _ = states.stride()
    request.batch, request.heads, tokens, _ = states.shape
    request.blocks = tokens // codec.block_length
    if codec.rotation is not None:
        request.signs = codec.rotation.signs.data_ptr()
    planes = request.planes
    for number, width in enumerate(codec.packed_format.plane_widths):
        planes[number] = parts[f"codes_{width}"].data_ptr()
    for name in _OTHER_PARTS & parts.keys():
        setattr(request, name, parts[name].data_ptr())
    if states.numel() >= MIN_PARALLEL_ELEMENTS and library.run_parallel:
        request.threads, request.run_parallel = torch.get_num_threads(), library.run_parallel
    return request


def find_block_strides(parts: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return how many blocks the rows and the heads of parts are apart; None where they lie in another way."""
    found = {_block_strides(part) for part in parts.values()}
    return found.pop() if len(found) == 1 else None


def _block_strides(part: torch.Tensor) -> tuple[int, int] | None:
    row, head, block, *_ = part.stride()
    is_whole = part[0, 0, 0].is_contiguous() if part.numel() else False
    size = part[0, 0, 0].numel() if is_whole else 0
    return (row // size, head // size) if is_whole and block == size and not row % size and not head % size else None


def address_of(request: EncodeRequest) -> int:
    """Return where a request lies; it must outlive the call."""
    return ctypes.addressof(request)
