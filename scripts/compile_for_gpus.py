"""Compile the Triton kernel for GPUs, without one, and write what it takes of them.

    python scripts/compile_for_gpus.py

Writes `benchmarks/results/gpu-compiled.json`: registers, spilled bytes and instructions of the program that attends, by
settings and compute capability. docs/speed.md makes a table of it, with the times that these numbers imply.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_compilation import assemble, compile_parts, measure_loop, plan_launch

from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.installed import find_version
from kvq.layers.savings import effective_bits
from kvq.testing.case import PLAIN

HEAD_DIM, SHARING = 128, 4
"""Elements of a head, and query heads for each key-value head."""
ARCHITECTURES = (80, 90, 120)
FOUR = {"nbits_k": 4, "nbits_v": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bit, values per token, neither rotated nor balanced": {**FOUR, **PLAIN, "axis_value": "per_token"},
    "4 bit": FOUR,
    "4 bit, metadata in bytes": {**FOUR, "metadata_dtype": "int8"},
    "8 bit": {"nbits_k": 8, "nbits_v": 8},
    "3 bit, metadata in bytes": {"nbits_k": 3, "nbits_v": 3, "metadata_dtype": "int8"},
    "2 bit, metadata in bytes": {"nbits_k": 2, "nbits_v": 2, "metadata_dtype": "int8"},
}
"""Backend native; what is not given is as by default: all groups per channel, rotated and balanced."""
RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu-compiled.json"


def main() -> None:
    programs = [describe(name, architecture) for name in SETTINGS for architecture in ARCHITECTURES]
    result = {
        "kernel": "triton",
        "versions": {"torch": torch.__version__, "triton": find_version("triton")},
        "shape": {"head_dim": HEAD_DIM, "queries_per_head": SHARING, "dtype": "bfloat16"},
        "programs": programs,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULT)


def describe(name: str, architecture: int) -> dict[str, Any]:
    """Return what the program of one row of `SETTINGS` takes."""
    request = make_request(SETTINGS[name])
    launch = plan_launch(request)
    with tempfile.TemporaryDirectory() as folder:
        assembled = assemble(compile_parts(launch, architecture), architecture, Path(folder))
        loop = measure_loop(assembled)
    codecs = request.pair.key.store.codec, request.pair.value.store.codec
    return {
        "settings": name,
        "compute_capability": architecture,
        "registers": assembled.registers,
        "spilled_bytes": assembled.spilled_bytes,
        "tile_tokens": launch.plan.options["TILE"],
        "warps": launch.plan.options["num_warps"],
        "instructions_per_tile_and_warp": loop.instructions,
        "matrix_products_per_tile_and_warp": loop.products,
        "effective_bits": [effective_bits(codec, HEAD_DIM) for codec in codecs],
    }


def make_request(settings: dict[str, Any]) -> AttentionRequest:
    """Return a step of decoding over a layer that has stored tokens."""
    cache = KVQ({"backend": "native", **settings})
    states = torch.randn(1, 1, 700, HEAD_DIM, dtype=torch.bfloat16)
    cache.update(states, states, 0)
    pair = cache.layers[0].update(states[:, :, :1], states[:, :, :1], packed=True)[0].pair
    query = torch.randn(1, SHARING, 1, HEAD_DIM, dtype=torch.bfloat16)
    return AttentionRequest(query, pair, None, scaling=1.0)


if __name__ == "__main__":
    main()
