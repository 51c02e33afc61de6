"""The kernel that calls the compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.compiled.library import Library, get_library, why_unavailable
from kvq.attention.kernels.compiled.store_addresses import StoreAddresses
from kvq.attention.kernels.compiled.structures import TYPE_NUMBERS, PackedRequest
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

MASK_DTYPES = (*STATES_DTYPES, torch.bool)
"""Dtypes that a mask may have."""

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
        if request.mask is not None and request.mask.dtype not in MASK_DTYPES:
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
        kept = addresses.call.write(request), _fill_mask(packed, request), _divide(addresses, library, request)
        if library.attend(addresses.place):
            raise MemoryError("attention: no memory for the sums of a thread")
        del kept
        return output


def _parts(*stores: StoreView) -> Iterator[torch.Tensor]:
    return (part for store in stores for segment in store.segments for part in segment.parts.values())


def _why_unsupported_side(quantizer: Quantizer) -> str | None:
    packed = find_packed_format(quantizer)
    if packed is None:
        return f"serves quantizers with a packed format, not {getattr(quantizer, 'kind', type(quantizer)).__name__}"
    dtypes = {packed.scale_dtype, packed.mid_dtype}
    if not packed.has_units and not dtypes <= {torch.float16, torch.float32, None}:
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


def _divide(addresses: StoreAddresses, library: Library, request: AttentionRequest) -> list[torch.Tensor]:
    """Decide threads and pieces of work; return the room for partial results."""
    packed = addresses.request
    batch, query_heads, queries, head_dim = request.query.shape
    products = batch * query_heads * queries * head_dim * request.pair.key.length
    threads = torch.get_num_threads() if library.run_parallel and products >= MIN_PARALLEL_PRODUCTS else 1
    packed.threads, packed.run_parallel = threads, library.run_parallel
    wanted = 1 if threads == 1 else -(-threads * ITEMS_PER_THREAD // addresses.items)
    packed.splits = splits = max(1, min(wanted, addresses.tiles // MIN_SPLIT_TILES))
    if splits == 1:
        return []
    rows = addresses.items * splits * request.row_count
    # The device is named: the caller may have set another one for tensors that say nothing.
    sums = torch.empty(rows * request.pair.value.like.shape[3], dtype=torch.float32, device=request.query.device)
    state = torch.empty(rows * 2, dtype=torch.float32, device=request.query.device)
    finished = torch.zeros(addresses.items, dtype=torch.int64, device=request.query.device)
    packed.partial_sums, packed.partial_state = sums.data_ptr(), state.data_ptr()
    packed.finished = finished.data_ptr()
    return [sums, state, finished]
