"""The measurements of the Triton kernel in docs/speed.md, from benchmarks/results/triton-*.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markdown_table import table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
COLUMNS = ("rows x tokens", "full precision", "kernel", "full precision / kernel")


def load_gpu_runs() -> list[dict[str, Any]]:
    """Return the committed runs, in the order of their files' names."""
    return list(_load_by_file().values())


def render_gpu_runs() -> Iterable[str]:
    """Yield a sentence and a table for each run."""
    for name, run in _load_by_file().items():
        shape, versions = run["shape"], run["versions"]
        yield (
            f"{run['device']}, torch {versions['torch']}, triton {versions['triton']}: one layer of {shape['heads']} "
            f"key-value and {shape['query_heads']} query heads, head dim {shape['head_dim']}, {shape['bits'][0]} bits, "
            f"{shape['dtype']}. Time on the device alone, from replayed CUDA graphs. Full precision is "
            "`scaled_dot_product_attention` over a preallocated buffer, in its faster form. "
            f"[All {len(run['ways'])} measurements](../benchmarks/results/{name})."
        )
        rows = [_row(one) for one in chosen_ways(run)]
        yield table(COLUMNS, rows, right=range(1, len(COLUMNS)))


def chosen_ways(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements made in the way that the kernel now runs, by `kvq.attention.kernels.triton.plan`."""
    from kvq.attention.kernels.triton.plan import LIGHT_WAY

    chosen = [one for one in run["ways"] if asdict(LIGHT_WAY).items() <= one.items()]
    return sorted(chosen, key=lambda one: (one["batch"], one["length"]))


def speedups(run: Mapping[str, Any]) -> list[float]:
    """Return how many times as fast as full precision each measurement is."""
    return [one["baseline_us"] / one["kernel_us"] for one in chosen_ways(run)]


def _load_by_file() -> dict[str, dict[str, Any]]:
    paths = sorted(RESULTS.glob("triton-*.json"))
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    kernel, full = one["kernel_us"], one["baseline_us"]
    return f"{one['batch']} x {one['length']:,}", f"{full:.0f} us", f"{kernel:.0f} us", f"{full / kernel:.2f}x"
