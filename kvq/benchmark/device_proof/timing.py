"""How fast is the kernel on this device, and in which way to launch it? Against flash attention over a full buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.plan import WARP_GROUP, has_warp_groups
from kvq.attention.kernels.triton.way import Way, forced_way
from kvq.config import PRESETS, KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer
from kvq.watcher import Watcher

Bench = Callable[[Callable[[], object]], float]
"""Returns the microseconds that a call takes on the device."""

HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
BITS = 4
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 8, 32)
SIZES = tuple((batch, length) for length in LENGTHS for batch in BATCHES)
"""Rows of the batch and tokens."""
TUNED_SIZES = ((1, 32768), (8, 32768))
WAYS = (
    *(Way(2, 1, registers, programs) for registers, programs in ((None, 4), (168, 6), (128, 8), (112, 9))),
    *(Way(4, 1, registers, programs) for registers, programs in ((None, 3), (168, 3), (128, 4), (96, 5), (80, 6))),
    *(Way(4, stages, 128, 4) for stages in (2, 3)),
    *(Way(8, 1, registers, 2) for registers in (None, 128)),
)
"""What is tried: warps, stages, registers of a thread, and programs for each processor, by which the store is split. A
block is as long as the groups of the store, so there is nothing to try."""
PIECE = 4096
"""Tokens that are quantized at once."""


def time_sizes(
    kernel: Kernel,
    device: torch.device,
    bench: Bench,
    watcher: Watcher,
    sizes: Sequence[tuple[int, int]] = SIZES,
    ways: Sequence[Way] = WAYS,
    tuned: Sequence[tuple[int, int]] = TUNED_SIZES,
) -> tuple[Way | None, list[dict[str, Any]]]:
    """Return the best way, and plain values for every way and size that was timed.

    All ways that may be launched on the device are tried at the sizes `tuned`; the one with the least sum of its times,
    each as a share of the best there, is taken at all others. A size for which the device has no memory has a "skipped"
    in place of times.
    """
    is_limited = device.type == "cuda" and has_warp_groups(device)
    ways = [way for way in ways if way.warps < WARP_GROUP or not is_limited]
    watcher.begin("tuning", len(tuned) + len(sizes), "sizes")
    found = [one for size in tuned for one in _time_size(kernel, device, bench, size, ways, watcher)]
    best = find_best_way(found, ways)
    for size in sizes:
        if size in tuned or best is None:
            watcher.advance(f"timing {size[0]} x {size[1]:,}")
            continue
        found += _time_size(kernel, device, bench, size, [best], watcher)
    return best, found


def find_best_way(found: Sequence[Mapping[str, Any]], ways: Sequence[Way]) -> Way | None:
    """Return the way that is the least behind the best of each size, over all sizes; None if none has a time."""
    timed = [one for one in found if "kernel_us" in one]
    least: dict[tuple[int, int], float] = {}
    for one in timed:
        size = one["batch"], one["length"]
        least[size] = min(one["kernel_us"], least.get(size, one["kernel_us"]))
    shares: dict[Way, list[float]] = {}
    for one in timed:
        way = Way(one["warps"], one["stages"], one["registers"], one["programs_per_processor"])
        shares.setdefault(way, []).append(one["kernel_us"] / least[one["batch"], one["length"]])
    complete = [way for way in ways if way in shares and len(shares[way]) == len(least)]
    return min(complete, key=lambda way: sum(shares[way]), default=None)


def make_step(batch: int, length: int, device: torch.device) -> AttentionRequest:
    """Return one step of decoding in bfloat16 over `length` tokens, stored as the preset of four bits says."""
    layer = KVQLayer(0, KVQCacheConfig.from_mapping(PRESETS[f"{BITS}bit"]).for_layer(0))
    for start in range(0, length - 1, PIECE):
        layer.update(*_draw(2, batch, HEADS, min(PIECE, length - 1 - start), HEAD_DIM, device=device), packed=True)
    handle: Any = layer.update(*_draw(2, batch, HEADS, 1, HEAD_DIM, device=device), packed=True)[0]
    query = _draw(batch, QUERY_HEADS, 1, HEAD_DIM, device=device)
    return AttentionRequest(query, handle.pair, None, HEAD_DIM**-0.5)


def time_full_precision(query: torch.Tensor, batch: int, length: int, bench: Bench) -> dict[str, float]:
    """Return the microseconds of flash attention over a buffer, by the form of its queries."""
    keys, values = _draw(2, batch, HEADS, length, HEAD_DIM, device=query.device)
    packed = query.reshape(batch, HEADS, -1, HEAD_DIM)
    attend = functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = {"packed queries": bench(lambda: attend(packed, keys, values))}
        try:
            found["enable_gqa"] = bench(lambda: attend(query, keys, values, enable_gqa=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # flash attention of this torch or device shares no heads
            pass
    return found


def _time_size(
    kernel: Kernel, device: torch.device, bench: Bench, size: tuple[int, int], ways: Sequence[Way], watcher: Watcher
) -> list[dict[str, Any]]:
    batch, length = size
    watcher.advance(f"timing {batch} x {length:,}")
    facts: dict[str, Any] = {"length": length, "batch": batch}
    try:
        request = make_step(batch, length, device)
        full = time_full_precision(request.query, batch, length, bench)
        return [_time_way(kernel, request, bench, way, {**facts, **_fastest(full)}) for way in ways]
    except torch.OutOfMemoryError:
        return [{**facts, "skipped": "the device has too little memory"}]


def _fastest(full: Mapping[str, float]) -> dict[str, Any]:
    form = min(full, key=lambda name: full[name])
    return {"baseline": form, "baseline_us": full[form]}


def _time_way(
    kernel: Kernel, request: AttentionRequest, bench: Bench, way: Way, facts: Mapping[str, Any]
) -> dict[str, Any]:
    request.pair.kernel_cache.forget_kernel_data()  # with the plan of another way
    with forced_way(way):
        kernel_us = bench(lambda: kernel.attend(request))
    return {
        "warps": way.warps,
        "registers": way.registers,
        "stages": way.stages,
        "programs_per_processor": way.programs_per_processor,
        "kernel_us": kernel_us,
        **facts,
    }


def _draw(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)
