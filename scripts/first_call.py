"""How long the first uses of compiled code take in a process, once it lies on disk, beside later ones.

    python scripts/first_call.py

Writes `benchmarks/results/first-call.json`, of which docs/speed.md has a row. Every process is new; one before them
builds the code and tries it where this machine has not done so yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from kvq import KVQ
from kvq.attention.entry import kvq_attention_forward
from kvq.benchmark.machine import describe_machine

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "first-call.json"
TOKENS = 256
LATER = 20
SHAPE = {
    "hidden_size": 576,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
"""Of SmolLM2, with one layer."""


def main() -> None:
    """Measure in new processes, or, with `--once`, in this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=15, help="new processes (15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--once", action="store_true", help="measure in this process, and print the milliseconds")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.once:
        print(json.dumps(measure()))
        return
    runs = [measure_anew(asked.threads) for _ in range(asked.processes + 1)][1:]
    samples = {name: [run[name] for run in runs] for name in runs[0]}
    record = {
        "tokens": TOKENS,
        "shape": SHAPE,
        "machine": describe_machine(torch.device("cpu")),
        "samples_ms": samples,
        "median_ms": {name: statistics.median(taken) for name, taken in samples.items()},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["median_ms"], indent=2))


def measure_anew(threads: int) -> dict[str, float]:
    """Return what a new process measured."""
    command = [sys.executable, __file__, "--once", "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # this file
    found: dict[str, float] = json.loads(done.stdout)
    return found


@torch.inference_mode()
def measure() -> dict[str, float]:
    """Return the milliseconds of the first use of each part, and the median of later ones: float32, backend native."""
    config = LlamaConfig(**SHAPE, vocab_size=9, attn_implementation="kvq")
    module = nn.Module()
    module.config = config
    states = torch.randn(2, 1, 3, TOKENS, 64)
    query, token = torch.randn(1, 9, 1, 64), torch.randn(2, 1, 3, 1, 64)

    def fill() -> Any:
        cache = KVQ(backend="native", nbits_k=4, nbits_v=4, model=config)
        cache.update(*states, 0)
        return cache

    def step(cache: Any) -> None:
        keys, values = cache.update(*token, 0)
        kvq_attention_forward(module, query, keys, values, None, scaling=0.125, dropout=0.0)

    filling = [take_ms(fill) for _ in range(LATER + 1)]
    caches = [fill() for _ in range(LATER + 1)]
    stepping = [take_ms(lambda cache=cache: step(cache)) for cache in caches]
    return {
        "first prompt": filling[0],
        "later prompts": statistics.median(filling[1:]),
        "first step": stepping[0],
        "later steps": statistics.median(stepping[1:]),
    }


def take_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
