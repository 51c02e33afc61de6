"""Time builds of the compiled kernel for the kinds of processor that this one can be, beside full precision.

    python scripts/time_kernel_builds.py

Writes `benchmarks/results/kernel-builds.json`, of which docs/speed.md has a table. The builds take turns in one
process on one thread, on the same request, and before each the processor's caches are filled with something else.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.compiled import kernel as calls
from kvq.attention.kernels.compiled.compiler import Toolchain, find_toolchain
from kvq.attention.kernels.compiled.library import SOURCE, Library
from kvq.benchmark.machine import describe_machine
from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "kernel-builds.json"
BUILDS = {
    "codes widened to float32": ("", ("-march=native", "-DKVQ_WIDEN_CODES")),
    "AVX2": ("avx2", ("-march=x86-64-v3", "-mtune=native")),
    "AVX2 and AVX-VNNI": ("avx_vnni", ("-march=x86-64-v3", "-mtune=native", "-mavxvnni")),
    "AVX-512": ("avx512vl", ("-march=x86-64-v4", "-mtune=native")),
    "AVX-512 and VNNI": ("avx512_vnni", ("-march=x86-64-v4", "-mtune=native", "-mavx512vnni")),
}
"""The newest instructions of each, by their name in /proc/cpuinfo, and flags of the compiler."""
FULL = "full precision"
CASES = (
    (128, 4, "bfloat16"),
    (128, 3, "bfloat16"),
    (128, 2, "bfloat16"),
    (128, 8, "bfloat16"),
    (128, 4, "float32"),
    (64, 4, "bfloat16"),
    (64, 4, "float32"),
)
"""Head dim, bits, dtype."""
TOKENS, HEADS, QUERY_HEADS = 8192, 8, 32
CACHE_FLOATS = 32 * 2**20
"""Elements that fill every cache of the processor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (21)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {
            name: build(Path(folder) / f"{place}.so", *flags)
            for place, (name, (needed, flags)) in enumerate(BUILDS.items())
            if not needed or needed in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        }
        cases = [measure(libraries, *case, rounds) for case in CASES]
    record = {
        "tokens": TOKENS,
        "heads": HEADS,
        "query_heads": QUERY_HEADS,
        "rounds": rounds,
        "machine": describe_machine(torch.device("cpu")),
        "cases": cases,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def build(path: Path, *flags: str) -> Library:
    """Return the kernel as it is built with these flags."""
    Toolchain(find_toolchain().command, (flags,)).compile(SOURCE, path)
    attend = ctypes.CDLL(str(path)).kvq_attend
    attend.argtypes, attend.restype = (ctypes.c_void_p,), ctypes.c_int
    return Library(attend, None, path.name)


@torch.inference_mode()
def measure(libraries: dict[str, Library], head_dim: int, bits: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of each build and of full precision, and the medians of ratios to the latter."""
    states = torch.randn(2, 1, HEADS, TOKENS, head_dim).to(getattr(torch, dtype))
    layer = KVQLayer(0, KVQCacheConfig(backend="native", nbits_k=bits, nbits_v=bits).for_layer(0))
    layer.update(*states[..., :-1, :])
    handle, _ = layer.update(*states[..., -1:, :], packed=True)
    query = torch.randn(1, QUERY_HEADS, 1, head_dim).to(states.dtype)
    request = AttentionRequest(query, handle.pair, None, head_dim**-0.5)
    packed_query = query.reshape(1, HEADS, -1, head_dim)
    kernel = calls.CompiledKernel()
    actions: dict[str, Callable[[], object]] = dict.fromkeys(libraries, lambda: kernel.attend(request))
    actions[FULL] = lambda: functional.scaled_dot_product_attention(packed_query, *states)
    filler = torch.empty(CACHE_FLOATS)
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            with mock.patch.object(calls, "get_library", return_value=libraries.get(name)):
                action()
                filler.fill_(number)
                start = time.thread_time()
                action()
                taken[name].append(1e3 * (time.thread_time() - start))
    timed = {name: times[1:] for name, times in taken.items()}
    ratios = {name: [a / b for a, b in zip(times, timed[FULL], strict=True)] for name, times in timed.items()}
    return {
        "head_dim": head_dim,
        "bits": bits,
        "dtype": dtype,
        "median_ms": {name: statistics.median(times) for name, times in timed.items()},
        "to_full_precision": {name: statistics.median(one) for name, one in ratios.items() if name != FULL},
    }


if __name__ == "__main__":
    main()
