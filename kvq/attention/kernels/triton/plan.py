"""What two launches need that stays the same from flush to flush: what is compiled, and how the store is shared out.

Triton looks at some fifty arguments at each launch; what is not a length or an address is worked out here, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import ChunkTable
from kvq.attention.kernels.triton.layout import SideLayout, padded, power_of_two, triton_dtype
from kvq.attention.kernels.triton.way import Way, find_forced_way
from kvq.plugin_api.packed_format import CHANNEL_SOURCES, ROTATION_SIGNS, get_packed_format
from kvq.store.chunks import StoreView
from kvq.store.declared_format import get_codebook
from kvq.store.rotation import HadamardRotation

LEAST_ROWS = 8
"""Least outer dimension of a product."""
MOST_ROWS = 16
"""Query vectors of a program whose tile is small."""
WARP_GROUP = 4
"""From this many warps on, Triton multiplies by the products of a whole warp group where a GPU has them: in release 3.6
from 16 rows on, in 3.9 from 8 on. Some of these read outside of their memory (issues 11366 and 10629 of
github.com/triton-lang/triton), so programs have fewer warps there."""
WITH_WARP_GROUPS = (9, 10, 11)
"""Major compute capabilities of GPUs that have them: Hopper, and Blackwell but for 12.0."""
EXACT_TILE = 64
"""As in `programs.py`."""
PROGRAMS_WITHOUT_DEVICE = 8
"""Where there is no GPU to ask, under Triton's interpreter."""
SMALL_TILE = 64 * 128
"""Elements of a tile that two warps keep in registers."""
LIGHT_WAY = Way(2, 1, 128, 8)
"""For such a tile, products in half width and at most 8 query vectors: registers for eight programs on a processor."""
PLANES_WAY = Way(2, 1, 168, 6)
"""For codes in several planes or of a codebook, which with fewer registers would lie in memory."""
WIDE_WAY = Way(2, 1, None, 4)
"""For such a tile and more query vectors, for larger ones, and for products in float32."""
FLOAT_WAYS = Way(4, 1, None, 6), Way(8, 1, None, 6)
"""For products in float32, of such a tile and of a larger one, where a GPU has no warp groups."""

FUSION = {"enable_fp_fusion": True}
"""Products and sums in one rounding, as all figures were measured. Triton 3.9 warns of a launch that does not say,
since 3.10 is not going to do it by itself."""


@dataclass(frozen=True)
class Plan:
    """A plan for requests of one kind, until the next flush.

    Attributes:
        key, value: layouts of the sides.
        rows: query vectors of one key-value head.
        row_ranges: ranges of them, of which a program takes one.
        sinks: exact tokens at the start of each row that are kept.
        splits: runs of tokens that the store is split into.
        tiles_per_split: tiles of each run.
        options: the compile-time arguments of `attend_parts`, and what Triton is told about its launch.
        key_levels, value_levels: codebooks, fp32; None: codes stand for themselves.
        key_sources: int64 `[H, channels]`, the element of a query that meets each stored channel; None: its own.
        key_rotation, value_rotation: orthogonal fp32 `[D, D]`: rotated states are `states @ rotation`; None without.
    """

    key: SideLayout
    value: SideLayout
    rows: int
    row_ranges: int
    sinks: int
    splits: int
    tiles_per_split: int
    options: dict[str, Any]
    key_levels: torch.Tensor | None
    value_levels: torch.Tensor | None
    key_sources: torch.Tensor | None
    key_rotation: torch.Tensor | None
    value_rotation: torch.Tensor | None


def get_plan(request: AttentionRequest, table: ChunkTable) -> Plan:
    """Return the plan for a request; the table keeps it."""
    kind = request.kind()
    plan: Plan | None = table.plans.get(kind)
    if plan is None:
        plan = table.plans[kind] = make_plan(request)
    return plan


def make_plan(request: AttentionRequest, room: int = 0) -> Plan:
    """Return a new plan for a request.

    Args:
        request: one request of its kind.
        room: tokens of the store that the plan is good for; at least those that are there.
    """
    pair, batch = request.pair, request.query.shape[0]
    key = SideLayout.of_keys(pair.key.store)
    value = SideLayout.of_values(pair.value.store, pair.value.like.shape[3])
    tile = max(key.packed.block_length, value.packed.block_length)
    tiles = max(request.stored_length, room) // tile
    way = find_forced_way() or choose_way(request, key, value, tile)
    most = MOST_ROWS if way.warps < WARP_GROUP and _is_light(request, key, value, tile) else LEAST_ROWS
    rows = min(most, max(LEAST_ROWS, power_of_two(request.row_count)))
    row_ranges = -(-request.row_count // rows)
    programs = _program_count(request.query.device, way.programs_per_processor)
    splits = min(tiles, max(1, programs // (batch * pair.key.like.shape[1] * row_ranges)))
    tiles_per_split = -(-tiles // splits)
    kept = pair.key.sinks.states
    sinks = 0 if kept is None else kept.shape[2]  # fewer than asked for until the store reaches them
    return Plan(
        key=key,
        value=value,
        rows=request.row_count,
        row_ranges=row_ranges,
        sinks=sinks,
        splits=-(-tiles // tiles_per_split),
        tiles_per_split=tiles_per_split,
        options={
            **_options(request, key, value),
            "ROWS": rows,
            "TILE": tile,
            "SINKS": sinks,
            "WINDOW_TILES": 0,
            **way.options(),
            **FUSION,
        },
        key_levels=_find_levels(pair.key.store, request.query.device),
        value_levels=_find_levels(pair.value.store, request.query.device),
        key_sources=_find_sources(pair.key.store, request.query.device),
        key_rotation=_find_rotation(pair.key.store),
        value_rotation=_find_rotation(pair.value.store),
    )


def _options(request: AttentionRequest, key: SideLayout, value: SideLayout) -> dict[str, Any]:
    dtype, queries = request.common_dtype, request.query.shape[2]
    return {
        **key.options("KEY", "K", dtype),
        **value.options("VALUE", "V", dtype),
        "EXACT_DIM": request.query.shape[3],
        "EXACT_PADDED": padded(request.query.shape[3]),
        "VALUE_SPLIT": value.split,
        "QUERIES": queries,
        "HAS_MASK": request.mask is not None,
        "IS_CAUSAL": request.mask is None and request.is_causal and queries > 1,
        "SOFTCAP": request.softcap is not None,
        "DOT": triton_dtype(dtype),
        "PRECISION": "tf32x3",
    }


def choose_way(request: AttentionRequest, key: SideLayout, value: SideLayout, tile: int) -> Way:
    """Return the way to launch, by what was fastest of 13 ways at 1 and 8 rows of 32,768 tokens on an H200.

    Few warps share the query, which each of them scales by itself; a pipeline of loads would take the room of programs
    that hide the waiting as well.
    """
    if not _is_light(request, key, value, tile):
        if request.common_dtype != torch.float32 or has_warp_groups(request.query.device):
            return WIDE_WAY
        return FLOAT_WAYS[0 if _is_small(key, value, tile) else 1]
    if request.row_count > LEAST_ROWS:
        return WIDE_WAY
    is_heavy = any(len(side.packed.plane_widths) > 1 or side.packed.has_codebook for side in (key, value))
    return PLANES_WAY if is_heavy else LIGHT_WAY


def has_warp_groups(device: torch.device) -> bool:
    """Return whether a GPU has products of warp groups; where there is no GPU to ask, as if it had."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in WITH_WARP_GROUPS


def _is_light(request: AttentionRequest, key: SideLayout, value: SideLayout, tile: int) -> bool:
    """Return whether two warps keep a tile in few registers."""
    return request.common_dtype != torch.float32 and _is_small(key, value, tile)


def _is_small(key: SideLayout, value: SideLayout, tile: int) -> bool:
    return tile * max(padded(key.head_dim), padded(value.head_dim)) <= SMALL_TILE


def _find_levels(view: StoreView, device: torch.device) -> torch.Tensor | None:
    packed = get_packed_format(view.codec)
    return get_codebook(packed, view.codec.constants()).to(device) if packed.has_codebook else None


def _find_sources(view: StoreView, device: torch.device) -> torch.Tensor | None:
    if not get_packed_format(view.codec).states_dim:
        return None
    return view.codec.constants()[CHANNEL_SOURCES].to(device, torch.int64)


def _find_rotation(view: StoreView) -> torch.Tensor | None:
    """Return the matrix of a side's rotation; one product is one launch, where the fast transform takes some twenty."""
    if not get_packed_format(view.codec).rotation_block:
        return None
    return _rotation_matrix(view.codec.constants()[ROTATION_SIGNS])


def _rotation_matrix(signs: torch.Tensor) -> torch.Tensor:
    return HadamardRotation.of_signs(signs).apply(torch.eye(len(signs), dtype=torch.float32, device=signs.device))


@cache
def _program_count(device: torch.device, programs_per_processor: int) -> int:
    """Return how many programs keep a device busy."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_DEVICE
    return programs_per_processor * torch.cuda.get_device_properties(device).multi_processor_count
