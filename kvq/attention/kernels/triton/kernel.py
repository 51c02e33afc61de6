"""Split-KV decoding on a CUDA device, in Triton: when it can serve a request, and how it is launched.

Two launches a step: every run of tokens by itself, then one merge. Lengths and addresses of the store are read on the
device; the host neither waits nor copies between flushes. Run on an H200 so far (docs/speed.md). As any kernel that
needs a benchmark, it is tried at its first use on a device, and is a default where it is right and fast.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from packaging.version import Version

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import get_chunk_table
from kvq.attention.kernels.triton.launch import Launch
from kvq.attention.kernels.triton.layout import padded
from kvq.attention.kernels.triton.plan import get_plan
from kvq.attention.machine.source_digest import digest_files
from kvq.installed import find_version
from kvq.plugin_api.packed_format import find_packed_format

LEAST_TRITON = Version("3.6")
"""Oldest release of triton that the programs were tested with."""
MAX_HEAD_DIM = 256
MAX_ROWS = 64
"""Most query vectors of one key-value head: longer runs of queries are a prefill, which other kernels serve."""
MAX_SINKS = 64
SHORTEST_BLOCK = 32
LONGEST_BLOCK = 128
LARGEST_TILE = 128 * 128
"""Elements that eight warps keep in registers."""
LEAST_CAPABILITY = (8, 0)
"""Of the device: bfloat16 products."""


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
        table = get_chunk_table(request.pair, request.query.device)
        return Launch(request, table, get_plan(request, table)).run()


TRITON = TritonKernel()


@cache
def _find_missing_triton() -> str | None:
    version = find_version("triton")
    if version is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs"
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
        return "codes without a packed format"
    if not all(store.segments for store in stores):
        return "nothing is quantized yet"
    lengths = [packed.block_length for packed in formats]
    tile = max(lengths)
    if any(length & (length - 1) or not SHORTEST_BLOCK <= length <= LONGEST_BLOCK for length in lengths):
        return f"blocks of {' and '.join(map(str, lengths))} tokens; powers of two from 32 to 128 are read"
    head_dim = max(formats[0].head_dim, request.pair.value.like.shape[3])
    if tile * padded(head_dim) > LARGEST_TILE:
        return f"blocks of {tile} tokens at head dim {head_dim}: more than the registers of a program"
    if any(packed.per_channel and packed.block_length < tile for packed in formats):
        return "per-channel groups that are shorter than the blocks of the other side"
    return None
