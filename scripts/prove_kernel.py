"""Measure a kernel of attention on this machine: is it right, and faster than full precision?

    python scripts/prove_kernel.py compiled

Writes `benchmarks/results/kernel-NAME-CLASS.json`. With an entry of its figures in
`kvq/attention/proving/benchmarked.json` the kernel is a default on this class of device, with no trial at first use.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import kvq
from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.machine.processor import name_processor
from kvq.attention.proving.benchmark_records import device_class
from kvq.attention.proving.trial import take_seconds
from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer

HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
SIZES = {"cpu": ((1, 8192), (1, 32768)), "cuda": ((1, 8192), (1, 32768), (1, 131072), (8, 32768), (32, 8192))}
"""Rows of the batch and tokens, by type of device."""
ERROR_LENGTHS = (300, 1000, 4097)
ROUNDS = 15
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=[kernel.name for kernel in get_kernel_registry().kernels])
    parser.add_argument("--device", default="cpu", help="device of torch (cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    kernel = next(kernel for kernel in get_kernel_registry().kernels if kernel.name == chosen.kernel)
    record = measure(kernel, device)
    path = RESULTS / f"kernel-{kernel.name}-{record['device_class']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    print(path)


def measure(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    errors = [measure_error(kernel, device, length, granularity) for length in ERROR_LENGTHS for granularity in (0, 1)]
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cpu" else (torch.bfloat16,)
    speeds = [measure_speed(kernel, device, *size, dtype) for dtype in dtypes for size in SIZES[device.type]]
    return {
        "kernel": kernel.name,
        "device_class": device_class(device),
        "relative_error": max(errors),
        "speedup": min(one["speedup"] for one in speeds),
        "speeds": speeds,
        "shape": {"heads": HEADS, "query_heads": QUERY_HEADS, "head_dim": HEAD_DIM, "bits": [4, 4]},
        "baseline": "scaled_dot_product_attention over a preallocated buffer, with queries packed by key-value head or "
        "enable_gqa, whichever is faster",
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "versions": {"kvq": kvq.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "processor": name_processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def make_request(
    length: int, dtype: torch.dtype, device: torch.device, batch: int = 1, **options: Any
) -> AttentionRequest:
    """Return one decode step over `length` tokens."""
    config = KVQCacheConfig(backend="native", nbits_k=4, nbits_v=4, q_group_size=64, **options)
    layer = KVQLayer(0, config.for_layer(0))
    history = torch.randn(2, batch, HEADS, length - 1, HEAD_DIM, device=device).to(dtype)
    layer.update(*history)
    newest = torch.randn(2, batch, HEADS, 1, HEAD_DIM, device=device).to(dtype)
    handle, _ = layer.update(*newest, packed=True)
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device).to(dtype)
    return AttentionRequest(query, handle.pair, None, HEAD_DIM**-0.5)


def measure_error(kernel: Kernel, device: torch.device, length: int, swapped: int) -> float:
    """Return the largest difference from dequantize-then-attend in fp64, relative to the largest output."""
    axes = ("per_channel", "per_token")
    request = make_request(length, torch.float32, device, axis_key=axes[swapped], axis_value=axes[1 - swapped])
    query = request.query.double().reshape(1, HEADS, -1, HEAD_DIM)
    keys, values = request.pair.key.materialize().double(), request.pair.value.materialize().double()
    weights = (query @ keys.transpose(-1, -2) * request.scaling).softmax(-1)
    expected = (weights @ values).reshape(1, 1, QUERY_HEADS, HEAD_DIM)
    return float((kernel.attend(request).double() - expected).abs().max() / expected.abs().max())


def measure_speed(kernel: Kernel, device: torch.device, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return medians over rounds in which the kernel and two forms of the baseline take turns."""
    request = make_request(length, dtype, device, batch)
    keys, values = torch.randn(2, batch, HEADS, length, HEAD_DIM, device=device).to(dtype)
    packed_query = request.query.reshape(batch, HEADS, -1, HEAD_DIM)
    attend = functional.scaled_dot_product_attention
    contenders: dict[str, Callable[[], object]] = {
        "kernel": lambda: kernel.attend(request),
        "packed queries": lambda: attend(packed_query, keys, values),
        "enable_gqa": lambda: attend(request.query, keys, values, enable_gqa=True),
    }
    taken = {name: [take_seconds(action, device) for _ in range(2)] for name, action in contenders.items()}
    for _ in range(ROUNDS):
        for name, action in contenders.items():
            taken[name].append(take_seconds(action, device))
    seconds = {name: one[2:] for name, one in taken.items()}
    baseline = min(("packed queries", "enable_gqa"), key=lambda name: statistics.median(seconds[name]))
    ratios = [full / own for full, own in zip(seconds[baseline], seconds["kernel"], strict=True)]
    return {
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "speedup": statistics.median(ratios),
        "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "kernel_ms": 1e3 * statistics.median(seconds["kernel"]),
        "baseline": baseline,
        "baseline_ms": 1e3 * statistics.median(seconds[baseline]),
        **_device_times(contenders, baseline, device),
    }


def _device_times(
    contenders: Mapping[str, Callable[[], object]], baseline: str, device: torch.device
) -> dict[str, float]:
    """Return milliseconds on a GPU alone, from replayed CUDA graphs: what is left where launches cost nothing."""
    if device.type != "cuda":
        return {}
    from triton.testing import do_bench_cudagraph

    return {
        "kernel_device_ms": do_bench_cudagraph(contenders["kernel"]),
        "baseline_device_ms": do_bench_cudagraph(contenders[baseline]),
    }


if __name__ == "__main__":
    main()
