"""The record of a device: is the kernel right there, how fast, and which way to launch it is best."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvq.attention.dispatch.kernel import BenchmarkedKernel
from kvq.attention.proving.benchmark_records import device_class
from kvq.attention.proving.samples import Sample
from kvq.benchmark.device_proof.correctness import SAMPLES, Comparison, compare_all
from kvq.benchmark.device_proof.timing import BITS, HEAD_DIM, HEADS, QUERY_HEADS, SIZES, Bench, time_sizes
from kvq.benchmark.machine import describe_machine
from kvq.installed import find_version
from kvq.watcher import Watcher

HOW = "triton.testing.do_bench_cudagraph: time on the device alone, replayed CUDA graphs; all in one run"
BASELINE = (
    "scaled_dot_product_attention, flash, over a preallocated buffer, the faster of queries packed by key-value head "
    "and enable_gqa"
)


def prove_device(
    kernel: BenchmarkedKernel,
    device: torch.device,
    watcher: Watcher,
    *,
    bench: Bench | None = None,
    samples: Sequence[Sample] = SAMPLES,
    time_all: Callable[..., Any] = time_sizes,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> dict[str, Any]:
    """Return the record of a kernel on a device, plain values; nothing is timed of a kernel that is wrong.

    Args:
        kernel: one that is available.
        device: where it is tried.
        watcher: is told how far the work is.
        bench: returns the microseconds of a call; by default those of replayed CUDA graphs.
        samples: the kinds of requests to compare.
        time_all: takes the times.
        sizes: rows of the batch and tokens to time.
    """
    compared = compare_all(kernel, device, watcher, samples)
    wrong = [one for one in compared if not one.is_right]
    best, ways = None, []
    if compared and not wrong:
        best, ways = time_all(kernel, device, bench or bench_cudagraph, watcher, sizes)
    machine = describe_machine(device)
    return {
        "kernel": kernel.name,
        "source": kernel.source_digest(),
        "kvq": find_version("kvq") or "unknown",
        "device": _name(machine, device),
        "device_class": device_class(device),
        "machine": machine,
        "versions": {name: machine["versions"].get(name) for name in ("torch", "triton", "transformers")},
        "shape": {"heads": HEADS, "query_heads": QUERY_HEADS, "head_dim": HEAD_DIM, "bits": [BITS, BITS],
                  "dtype": "bfloat16"},
        "how": HOW,
        "baseline": BASELINE,
        "compared": len(compared),
        "relative_error": max((one.error for one in compared if one.sample.dtypes[0] == torch.float32), default=None),
        "wrong": [_describe(one) for one in wrong],
        "best_way": None if best is None else asdict(best),
        "speedup": _least_speedup(ways, best),
        "ways": ways,
    }  # fmt: skip


def write_record(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record, by default to `triton-CLASS.json` in the working directory, and return the path."""
    path = path or Path(f"{record['kernel']}-{record['device_class']}.json")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def bench_cudagraph(action: Callable[[], object]) -> float:
    """Return the microseconds that an action takes on a CUDA device, from replayed CUDA graphs."""
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(action))


def _name(machine: dict[str, Any], device: torch.device) -> str:
    if "gpu" not in machine:
        return str(machine["cpu"])
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{machine['gpu']['name']}, {processors} multiprocessors"


def _describe(one: Comparison) -> dict[str, Any]:
    return {"sample": str(one.sample), "error": one.error, "tolerance": one.tolerance}


def _least_speedup(ways: Sequence[dict[str, Any]], best: Any) -> float | None:
    """Return how many times as fast as full precision the best way is where it is the least so."""
    chosen = {} if best is None else asdict(best)
    timed = [one for one in ways if "kernel_us" in one and chosen.items() <= one.items()]
    return min((one["baseline_us"] / one["kernel_us"] for one in timed), default=None)
