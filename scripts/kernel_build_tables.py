"""The times of builds of the compiled kernel; `scripts/time_kernel_builds.py` measures them."""

from __future__ import annotations

import json

from markdown_table import table
from quality_tables import RESULTS

RESULT = RESULTS / "kernel-builds.json"
FULL = "full precision"


def render_kernel_builds() -> str:
    """Return the milliseconds of full precision and each build's share of them."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    machine, builds = result["machine"], list(result["cases"][0]["to_full_precision"])
    told = (
        f"{result['tokens']:,} tokens, {result['heads']} key-value heads, {result['query_heads']} query heads: one "
        f"thread of {machine['cpu']} with {machine['instructions']}; torch {machine['versions']['torch']}; medians of "
        f"{result['rounds']} rounds."
    )
    rows = [
        (
            f"head dim {case['head_dim']}, {case['bits']} bits, {case['dtype']}",
            f"{case['median_ms'][FULL]:.2f}",
            *(f"{case['to_full_precision'][name]:.2f}" for name in builds),
        )
        for case in result["cases"]
    ]
    columns = ("time against SDPA over a buffer", "SDPA, ms", *builds)
    return f"{told}\n\n{table(columns, rows, right=range(1, len(columns)))}"
