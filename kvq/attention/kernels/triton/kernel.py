"""Split-KV decoding on a CUDA device, in Triton: when it can serve a request, and how it is launched.

Two launches a step: every run of tokens by itself, then one merge. Lengths and addresses of the store are read on the
device; the host neither waits nor copies between flushes. Written without a GPU at hand, and not yet run on one: as any
kernel that needs a benchmark, it is tried at its first use on a device, and is a default where it is right and fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import ChunkTable, get_chunk_table
from kvq.attention.machine.source_digest import digest_files
from kvq.installed import find_version
from kvq.plugin_api.packed_format import ROTATION_SIGNS, PackedFormat, find_packed_format, get_packed_format
from kvq.store.chunks import StoreView
from kvq.store.rotation import HadamardRotation
from kvq.store.side import SideView

LEAST_TRITON = Version("3.7")
"""Oldest release of triton that the programs were tested with."""
MAX_HEAD_DIM = 256
MAX_ROWS = 64
"""Most query vectors of one key-value head: longer runs of queries are a prefill, which other kernels serve."""
MAX_SINKS = 64
SHORTEST_BLOCK = 32
LONGEST_BLOCK = 128
LEAST_CAPABILITY = (8, 0)
"""Of the device: bfloat16 products."""
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_WITHOUT_DEVICE = 8
"""Where there is no GPU to ask, under Triton's interpreter."""
SMALLEST_DOT = 16
WARPS = {64 * 64: 4, 64 * 128: 8, 128 * 128: 16}
"""Warps of a program by the most elements of a tile: few enough for registers to suffice (`ptxas` on sm_80, sm_90)."""
EXACT_TILE = 64
"""As in `programs.py`."""


class TritonKernel:
    """Attention over a packed layer in split-KV fashion (Flash-Decoding), on the codes themselves."""

    name = "triton"
    device_types = frozenset({"cuda"})
    needs_benchmark = True

    def why_unavailable(self) -> str | None:
        """Return why triton is missing on this machine, or None."""
        return _find_missing_triton()

    def source_digest(self) -> str:
        """Return the digest of the programs, of what launches them, and of the version of triton."""
        return digest_files(Path(__file__).parent, "*.py", extra=find_version("triton") or "")

    def why_unsupported(self, request: AttentionRequest) -> str | None:
        """Return why the kernel cannot serve requests of this kind, or None where it can."""
        return _why_unsupported_device(request) or _why_unsupported_shape(request) or _why_unsupported_store(request)

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]`, contiguous, in the dtype of the query."""
        return _Launch(request, get_chunk_table(request.pair, request.query.device)).run()


TRITON = TritonKernel()


@dataclass(frozen=True)
class SideLayout:
    """The facts of a side that are compiled into a program.

    Attributes:
        head_dim: D.
        mode: number of the way in which scales lie, as in `programs.py`.
        packed: the side's format.
        rotation: the side's rotation, or None.
    """

    head_dim: int
    mode: int
    packed: PackedFormat
    rotation: HadamardRotation | None

    @classmethod
    def of(cls, view: StoreView, head_dim: int) -> SideLayout:
        """Return the layout of a side whose quantizer has a packed format."""
        packed = get_packed_format(view.codec)
        mode = 0 if packed.per_channel else 1 if packed.groups_per_token == 1 else 2
        signs = view.codec.constants()[ROTATION_SIGNS] if packed.rotation_block else None
        return cls(head_dim, mode, packed, None if signs is None else HadamardRotation.of_signs(signs))

    def options(self, name: str, letter: str) -> dict[str, Any]:
        """Return the compile-time arguments of a side called `name`."""
        packed, widths = self.packed, self.packed.plane_widths
        planes = {f"{letter}{place}": widths[place] if place < len(widths) else 0 for place in range(3)}
        return {
            f"{name}_DIM": self.head_dim,
            f"{name}_PADDED": _padded(self.head_dim),
            f"{name}_LENGTH": packed.block_length,
            f"{name}_MODE": self.mode,
            f"{name}_GROUP": packed.group_length,
            f"{name}_SCALE": _triton_dtype(packed.scale_dtype),
            f"{name}_MID": _triton_dtype(packed.mid_dtype),
            f"{name}_SHIFTED": packed.has_exponent,
            f"{name}_MID_SHIFTED": packed.shifts_mid,
            **planes,
        }


class _Launch:
    """One call of the two programs."""

    def __init__(self, request: AttentionRequest, table: ChunkTable) -> None:
        self.request, self.table, self.pair = request, table, request.pair
        self.batch, self.query_heads, self.queries, key_dim = request.query.shape
        self.heads = self.pair.key.like.shape[1]
        self.rows = request.row_count
        self.key = SideLayout.of(self.pair.key.store, key_dim)
        self.value = SideLayout.of(self.pair.value.store, self.pair.value.like.shape[3])
        self.tile = max(self.key.packed.block_length, self.value.packed.block_length)
        self.sinks = self.pair.key.sinks.length if self.pair.key.sinks.states is not None else 0
        tiles = request.stored_length // self.tile
        self.splits = min(tiles, max(1, _program_count(request.query.device) // (self.batch * self.heads)))
        self.tiles_per_split = -(-tiles // self.splits)
        self.splits = -(-tiles // self.tiles_per_split)
        self.window_length = self.pair.key.window.shape[2]
        self.new_length = 0 if self.pair.key.new is None else self.pair.key.new.shape[2]
        exact = -(-self.window_length // EXACT_TILE) - (-self.new_length // EXACT_TILE) + (self.sinks > 0)
        self.parts = self.splits + exact

    def run(self) -> torch.Tensor:
        """Return the output."""
        peaks, totals, outputs = self._attend_parts()
        return self._combine(peaks, totals, outputs)

    def _attend_parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from kvq.attention.kernels.triton.programs import attend_parts

        request, pair, table = self.request, self.pair, self.table
        pairs, value_dim = self.batch * self.heads, self.value.head_dim
        exact_query = request.query.reshape(pairs, self.rows, self.key.head_dim).contiguous()
        rotation = self.key.rotation
        query = exact_query if rotation is None else rotation.apply(exact_query.float())
        new_fp32 = {"dtype": torch.float32, "device": query.device}
        peaks, totals = (torch.empty((pairs, self.parts, self.rows), **new_fp32) for _ in range(2))  # type: ignore[call-overload]
        outputs = torch.empty((pairs, self.parts, self.rows, value_dim), **new_fp32)  # type: ignore[call-overload]
        sources = [_source(side.window, query) for side in (pair.key, pair.value)]
        sources += [_source(side.new, query) for side in (pair.key, pair.value)]
        (window_key, *wk), (window_value, *wv), (new_key, *nk), (new_value, *nv) = sources
        mask, mask_batch_stride, mask_query_stride = self._mask(query)
        attend_parts[(pairs, self.parts)](
            query,
            exact_query,
            table.key.addresses,
            table.key.blocks,
            table.value.addresses,
            table.value.blocks,
            table.stored_length,
            window_key,
            window_value,
            new_key,
            new_value,
            _sink_states(pair.key, query),
            _sink_states(pair.value, query),
            table.starts,
            mask,
            peaks,
            totals,
            outputs,
            request.scaling,
            1.0 if request.softcap is None else request.softcap,
            self.heads,
            self.rows,
            self.splits,
            self.parts,
            self.tiles_per_split,
            self.window_length,
            self.new_length,
            mask_batch_stride,
            mask_query_stride,
            *wk,
            *wv,
            *nk,
            *nv,
            **self.options(),
        )
        return peaks, totals, outputs

    def options(self) -> dict[str, Any]:
        """Return the compile-time arguments of `attend_parts`."""
        request = self.request
        elements = self.tile * max(_padded(self.key.head_dim), _padded(self.value.head_dim))
        warps = next(count for most, count in WARPS.items() if elements <= most)
        return {
            **self.key.options("KEY", "K"),
            **self.value.options("VALUE", "V"),
            "ROWS": max(SMALLEST_DOT, _power_of_two(self.rows)),
            "QUERIES": self.queries,
            "TILE": self.tile,
            "SINKS": self.sinks,
            "HAS_MASK": request.mask is not None,
            "IS_CAUSAL": request.mask is None and request.is_causal and self.queries > 1,
            "SOFTCAP": request.softcap is not None,
            "DOT": _triton_dtype(request.common_dtype),
            "PRECISION": "tf32x3",
            "num_warps": warps,
            "num_stages": 2 if warps < max(WARPS.values()) else 1,
        }

    def _combine(self, peaks: torch.Tensor, totals: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        from kvq.attention.kernels.triton.programs import combine

        request, rotation, value_dim = self.request, self.value.rotation, self.value.head_dim
        shape = (self.batch, self.queries, self.query_heads, value_dim)
        like = request.query if rotation is None else outputs
        output = torch.empty(shape, dtype=like.dtype, device=like.device)
        stored_output = output if rotation is None else torch.empty_like(output)
        combine[(self.batch * self.heads, self.rows)](
            peaks,
            totals,
            outputs,
            outputs if request.sink_logits is None else request.sink_logits,
            stored_output,
            output,
            self.heads,
            self.rows,
            self.splits,
            self.parts,
            VALUE_DIM=value_dim,
            VALUE_PADDED=_padded(value_dim),
            QUERIES=self.queries,
            HAS_LOGITS=request.sink_logits is not None,
            APART=rotation is not None,
        )
        return output if rotation is None else rotation.undo(stored_output).add_(output).to(request.query.dtype)

    def _mask(self, query: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Return the mask as bytes, or any tensor where there is none, and its strides along rows and queries."""
        mask = self.request.mask
        if mask is None:
            return query, 0, 0
        seen = mask.expand(self.batch, 1, self.queries, mask.shape[3]).view(torch.uint8)
        if seen.stride(3) != 1:
            seen = seen.contiguous()
        return seen, seen.stride(0), seen.stride(2)


@cache
def _find_missing_triton() -> str | None:
    version = find_version("triton")
    if version is None:
        return "triton is not installed"
    return None if Version(version) >= LEAST_TRITON else f"triton {version} is older than {LEAST_TRITON}"


def _why_unsupported_device(request: AttentionRequest) -> str | None:
    device = request.query.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "needs compute capability 8.0"
    for view in (request.pair.key.store, request.pair.value.store):
        if any(segment.parts["scale"].device != device for segment in view.segments if "scale" in segment.parts):
            return "the store lies on another device"
    return None


def _why_unsupported_shape(request: AttentionRequest) -> str | None:
    mask, pair, queries = request.mask, request.pair, request.query.shape[2]
    if max(request.query.shape[3], pair.value.like.shape[3]) > MAX_HEAD_DIM:
        return f"head dims above {MAX_HEAD_DIM}"
    if request.row_count > MAX_ROWS:
        return f"more than {MAX_ROWS} query vectors for one key-value head"
    if pair.key.sinks.length > MAX_SINKS:
        return f"more than {MAX_SINKS} sinks"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1):
        return "a mask that is not boolean, or differs by head"
    if queries > 1 and (pair.key.new is None or pair.key.new.shape[2] != queries):
        return "several queries that are not the newest tokens"
    return None


def _why_unsupported_store(request: AttentionRequest) -> str | None:
    stores = request.pair.key.store, request.pair.value.store
    formats = [packed for store in stores if (packed := find_packed_format(store.codec)) is not None]
    if len(formats) < len(stores):
        return "codes that are not affine"
    if not all(store.segments for store in stores):
        return "nothing is quantized yet"
    lengths = [packed.block_length for packed in formats]
    tile = max(lengths)
    if any(length & (length - 1) or not SHORTEST_BLOCK <= length <= LONGEST_BLOCK for length in lengths):
        return f"blocks of {' and '.join(map(str, lengths))} tokens; powers of two from 32 to 128 are read"
    head_dim = max(request.query.shape[3], request.pair.value.like.shape[3])
    if tile * _padded(head_dim) > max(WARPS):
        return f"blocks of {tile} tokens at head dim {head_dim}: more than the registers of a program"
    if any(packed.per_channel and packed.block_length < tile for packed in formats):
        return "per-channel groups that are shorter than the blocks of the other side"
    return None


def _source(states: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Return states whose head is contiguous, and their strides along rows, heads and tokens."""
    if states is None:
        return like, 0, 0, 0
    states = states if states.stride(3) == 1 else states.contiguous()
    return states, states.stride(0), states.stride(1), states.stride(2)


def _sink_states(side: SideView, like: torch.Tensor) -> torch.Tensor:
    return like if side.sinks.states is None else side.sinks.states


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _padded(head_dim: int) -> int:
    return max(SMALLEST_DOT, _power_of_two(head_dim))


@cache
def _program_count(device: torch.device) -> int:
    """Return how many programs keep a device busy."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_DEVICE
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
