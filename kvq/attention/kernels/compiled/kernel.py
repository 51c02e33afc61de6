"""The kernel that calls the compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.compiled.library import Library, get_library, why_unavailable
from kvq.attention.kernels.compiled.store_addresses import TYPE_NUMBERS, StoreAddresses
from kvq.attention.kernels.compiled.structures import PackedRequest, States
from kvq.attention.machine.source_digest import digest_files
from kvq.attention.visibility import with_four_dims
from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.chunks import StoreView

MAX_ROWS = 64
"""Most query vectors a key-value head for which codes are multiplied as they are; more are worth a matrix product."""
MIN_PARALLEL_PRODUCTS = 1 << 18
"""Products of a query element and a key element below which one thread is as fast as several."""
ITEMS_PER_THREAD = 4
"""Pieces of work for each thread: with more than one, none waits long for the others."""
MIN_SPLIT_TILES = 8
"""Fewest tiles of tokens that are worth a piece of work of their own."""

STATES_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that query, keys and values in full precision may have; under autocast they differ."""

_DATA_NAME = "compiled"


class CompiledKernel:
    """C, built for the machine at its first use; on processors, for affine quantizers and few queries at a time."""

    name = "compiled"
    device_types = frozenset({"cpu"})
    needs_benchmark = True

    def why_unavailable(self) -> str | None:
        """Return why it could not be built, or None; builds it if need be."""
        return why_unavailable()

    def source_digest(self) -> str:
        """Return the digest of the library and of the files that call it."""
        return digest_files(Path(__file__).parent, "*.py", extra=get_library().digest)

    def why_unsupported(self, request: AttentionRequest) -> str | None:
        """Return the part of the request that it does not serve."""
        pair, query = request.pair, request.query
        if request.row_count > MAX_ROWS:
            return f"serves up to {MAX_ROWS} queries for a key-value head, not {request.row_count}"
        for dtype in (query.dtype, pair.key.like.dtype, pair.value.like.dtype):
            if dtype not in STATES_DTYPES:
                return f"does not read states of {dtype}"
        if any(part.device != query.device for part in _parts(pair.key.store, pair.value.store)):
            return "reads no store on another device than the query"
        if request.mask is not None and request.mask.dtype not in TYPE_NUMBERS:
            return f"does not read masks of {request.mask.dtype}"
        return _why_unsupported_side(pair.key.store.codec) or _why_unsupported_side(pair.value.store.codec)

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]` in the dtype of the query."""
        library = get_library()
        addresses = _get_addresses(request)
        batch, query_heads, queries, _ = request.query.shape
        output = request.query.new_empty((batch, queries, query_heads, request.pair.value.like.shape[3]))
        packed = addresses.request
        packed.output = output.data_ptr()
        kept = _fill(packed, request), _fill_mask(packed, request), _divide(packed, library, request)
        if library.attend(ctypes.addressof(packed)):
            raise MemoryError("attention: no memory for the sums of a thread")
        del kept
        return output


def _parts(*stores: StoreView) -> Iterator[torch.Tensor]:
    return (part for store in stores for segment in store.segments for part in segment.parts.values())


def _why_unsupported_side(quantizer: Quantizer) -> str | None:
    packed = find_packed_format(quantizer)
    if packed is None:
        return f"serves affine quantizers, not {getattr(quantizer, 'kind', type(quantizer)).__name__}"
    dtypes = {packed.scale_dtype, packed.mid_dtype}
    if not packed.has_units and not dtypes <= {torch.float16, torch.float32}:
        return f"does not read metadata of {' and '.join(map(str, dtypes))}"
    if packed.block_length % 8:
        return f"serves groups along tokens in multiples of 8, not {packed.block_length}"
    return None


def _get_addresses(request: AttentionRequest) -> StoreAddresses:
    pair = request.pair
    kept = pair.kernel_cache.kernel_data
    addresses: StoreAddresses | None = kept.get(_DATA_NAME)
    if addresses is None or not addresses.serve(pair):
        addresses = kept[_DATA_NAME] = StoreAddresses.of(pair)
    return addresses


def _fill(packed: PackedRequest, request: AttentionRequest) -> list[torch.Tensor]:
    """Write everything but the mask; return the tensors that must live until the call is over."""
    query, pair = _with_contiguous_head(request.query), request.pair
    kept = [query]
    packed.query, packed.query_type = query.data_ptr(), TYPE_NUMBERS[query.dtype]
    packed.key_type, packed.value_type = TYPE_NUMBERS[pair.key.like.dtype], TYPE_NUMBERS[pair.value.like.dtype]
    packed.query_strides[:] = query.stride()[:3]
    packed.queries_per_head, packed.queries = request.queries_per_head, query.shape[2]
    packed.scaling, packed.softcap = request.scaling, request.softcap or 0.0
    packed.is_causal = request.is_causal and query.shape[2] > 1
    for states, side in ((packed.keys, pair.key), (packed.values, pair.value)):
        for place, tensor in enumerate((side.sinks.states if side.store.segments else None, side.window, side.new)):
            if tensor is not None:
                kept.append(_fill_states(states[place], tensor))
            else:
                states[place].data, states[place].length = None, 0
    if request.sink_logits is None:
        packed.sink_logits = None
    else:
        kept.append(request.sink_logits.float().contiguous())
        packed.sink_logits = kept[-1].data_ptr()
    return kept


def _fill_states(states: States, tensor: torch.Tensor) -> torch.Tensor:
    tensor = _with_contiguous_head(tensor)
    states.data = tensor.data_ptr()
    states.batch_stride, states.head_stride, states.token_stride, _ = tensor.stride()
    states.length = tensor.shape[2]
    return tensor


def _fill_mask(packed: PackedRequest, request: AttentionRequest) -> torch.Tensor | None:
    mask = request.mask
    if mask is None:
        packed.mask = None
        return None
    shape = (*request.query.shape[:3], request.pair.key.length)
    mask = with_four_dims(mask)[..., : shape[-1]].expand(shape)
    packed.mask, packed.mask_type = mask.data_ptr(), TYPE_NUMBERS[mask.dtype]
    packed.mask_strides[:] = mask.stride()
    return mask


def _divide(packed: PackedRequest, library: Library, request: AttentionRequest) -> list[torch.Tensor]:
    """Decide threads and pieces of work; return the room for partial results."""
    batch, query_heads, queries, head_dim = request.query.shape
    products = batch * query_heads * queries * head_dim * request.pair.key.length
    threads = torch.get_num_threads() if library.run_parallel and products >= MIN_PARALLEL_PRODUCTS else 1
    packed.threads, packed.run_parallel = threads, library.run_parallel
    items = batch * packed.heads
    tiles = packed.stored // packed.tile_length
    wanted = 1 if threads == 1 else -(-threads * ITEMS_PER_THREAD // items)
    packed.splits = splits = max(1, min(wanted, tiles // MIN_SPLIT_TILES))
    if splits == 1:
        return []
    rows = items * splits * request.row_count
    # The device is named: the caller may have set another one for tensors that say nothing.
    sums = torch.empty(rows * request.pair.value.like.shape[3], dtype=torch.float32, device=request.query.device)
    state = torch.empty(rows * 2, dtype=torch.float32, device=request.query.device)
    finished = torch.zeros(items, dtype=torch.int64, device=request.query.device)
    packed.partial_sums, packed.partial_state = sums.data_ptr(), state.data_ptr()
    packed.finished = finished.data_ptr()
    return [sums, state, finished]


def _with_contiguous_head(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
