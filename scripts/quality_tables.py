"""The tables of docs/quality.md, from the results that `scripts/measure_quality.py` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from markdown_table import table

from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.quality.record import judge

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TEXTS = {
    "stdlib": "the text model on source files of Python that it has not seen",
    "recall": "the recall model on records and questions about them",
}
COLUMNS = ("cache", "KL divergence", "perplexity", "top-1", "needle", "bits K / V", "KiB held", "smaller")
TAIL_COLUMNS = (
    "cache",
    "KL divergence",
    "median",
    "99 %",
    "99.9 %",
    *COLUMNS[2:4],
    "key, log p",
    "drift",
    *COLUMNS[5:],
)
"""The columns of reports from format 2 on, which have the figures."""
COMPARISONS = ("ours", "theirs", "bytes", "KL divergence", "difference, 95 % interval", "verdict")

CHOICES = ("default", "instead", "bits held", "KL, text model", "KL, recall model")
GRID_PAIRS = (
    ("4 bits for keys, 2 for values", "2 for keys, 4 for values", "bits: backend=native bits={}", "4/2", "2/4"),
    ("4 and 2 bits", "3 and 3", "bits: {}", "backend=native bits=4/2", "bits=3/3"),
    ("4 and 2 bits, quanto", "hqq", "bits: backend={} bits=4/2", "quanto", "hqq"),
    (
        "keys per channel (4/4)",
        "per token",
        "granularity: bits=4/4 axis_key={} axis_value=per_token",
        "per_channel",
        "per_token",
    ),
    (
        "values per token (4/4)",
        "per channel",
        "granularity: bits=4/4 axis_key=per_channel axis_value={}",
        "per_token",
        "per_channel",
    ),
    ("key groups of 64", "of 32", "groups: bits=4/2 group_key={} group_value=64", "64", "32"),
    ("key groups of 64", "of 128", "groups: bits=4/2 group_key={} group_value=64", "64", "128"),
    ("value groups of 64", "of 32", "groups: bits=4/2 group_key=64 group_value={}", "64", "32"),
    ("window of 128", "of 64", "ends: bits=4/2 sink_length=4 residual_length={}", "128", "64"),
    ("window of 128", "of 32", "ends: bits=4/2 sink_length=4 residual_length={}", "128", "32"),
    ("4 sinks", "none", "ends: bits=4/2 sink_length={} residual_length=128", "4", "0"),
    ("no rotation", "of the keys", "rotation: bits=4/2 rotation_k={} rotation_v=none clip=False", "none", "hadamard"),
    ("no rotation", "of the values", "rotation: bits=4/2 rotation_k=none rotation_v={} clip=False", "none", "hadamard"),
    ("no clipping", "by least error", "rotation: bits=4/2 rotation_k=none rotation_v=none clip={}", "False", "True"),
    ("scales in float16 (4/4)", "bfloat16", "metadata: bits=4/4 metadata_dtype={}", "float16", "bfloat16"),
    ("scales in float16 (4/4)", "float32", "metadata: bits=4/4 metadata_dtype={}", "float16", "float32"),
)
"""The default, the alternative, and the labels of both in the grid."""


def render_quality() -> str:
    """Return the cost of the configurations and of transformers' caches, on both texts, and like against like."""
    pieces = []
    for text in TEXTS:
        report = load_report(text)
        columns = quality_columns(report)
        pieces += [describe_report(report, text), table(columns, quality_rows(report), right=range(1, len(columns)))]
        pieces += [table(COMPARISONS, comparison_rows(report), right=(2, 3, 4)), list_failures(report)]
    return "\n\n".join(piece for piece in pieces if piece)


def render_choices() -> str:
    """Return each default that the grid decided, and what every other choice would have changed."""
    return table(CHOICES, choice_rows(), right=(2, 3, 4))


def choice_rows() -> list[tuple[str, ...]]:
    """Return a row of cells under `CHOICES` for each pair of the grid: what the other choice would change."""
    grids = [_load_grid(text) for text in TEXTS]
    rows = []
    for chosen, instead, label, one, other in GRID_PAIRS:
        pairs = [(grid[label.format(one)], grid[label.format(other)]) for grid in grids]
        held = " → ".join(f"{row['effective_bits']:.2f}" for row in pairs[0])
        rows.append((chosen, instead, held, *(compare_rows(*pair) for pair in pairs)))
    return rows


def _load_grid(text: str) -> dict[str, dict[str, Any]]:
    found = json.loads((RESULTS / f"quality_grid_{text}.json").read_text(encoding="utf-8"))
    return {row["label"]: row for row in found["records"]}


def compare_rows(chosen: dict[str, Any], instead: dict[str, Any]) -> str:
    """Return the factor by which another choice changes the divergence, and a verdict by the interval over texts."""
    difference = Estimate.of_parts(torch.tensor(instead["kl_by_sequence"]) - torch.tensor(chosen["kl_by_sequence"]))
    return f"{instead['kl']['mean'] / chosen['kl']['mean']:.2f}x, {judge(difference)}"


def load_report(text: str) -> dict[str, Any]:
    """Return the results of one kind of text."""
    found: dict[str, Any] = json.loads((RESULTS / f"quality_report_{text}.json").read_text(encoding="utf-8"))
    return found


def quality_columns(report: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns that a report has figures for; one of format 1 has no percentiles but the 99th."""
    return COLUMNS if report.get("format", 1) == 1 else TAIL_COLUMNS


def quality_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `quality_columns` for each cache that could be measured, best first."""
    measured = [record for record in report["records"] if not record["failure"]]
    row = _row if report.get("format", 1) == 1 else _row_with_tail
    return [row(record) for record in sorted(measured, key=lambda record: record["kl"]["mean"])]


def comparison_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COMPARISONS` for each pair."""
    return [
        (
            pair["one"],
            pair["other"],
            f"{pair['bytes_ratio']:.3f}x",
            f"{pair['kl_ratio']:.2f}x",
            f"{pair['kl_difference']:+.1e} ± {pair['half_width']:.0e}",
            pair["verdict"],
        )
        for pair in report["comparisons"]
    ]


def describe_report(report: dict[str, Any], text: str) -> str:
    """Return the sentence above a table."""
    return (
        f"{TEXTS[text][0].upper()}{TEXTS[text][1:]}: {report['sequences']} texts of {report['length']:,} tokens, "
        f"{report['length'] - report['prefill']} of each "
        f"read from the cache in steps of {report['step']}; {report['dtype']}."
    )


def list_failures(report: dict[str, Any]) -> str:
    """Return a sentence about caches that could not be measured, or nothing."""
    failed = [f"{one['label']} raises `{one['failure']}`" for one in report["records"] if one["failure"]]
    return f"Not measured: {'; '.join(failed)}." if failed else ""


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    needle, keys = record["needle"], record["bits_key"]
    return (
        record["label"],
        _estimate(record["kl"]),
        f"{record['ppl_change']:+.2%}",
        f"{record['top1']:.1%}",
        "-" if needle is None else f"{needle:.0%}",
        "-" if keys is None else f"{keys:.2f} / {record['bits_value']:.2f}",
        f"{record['held_bytes'] / 1024:,.0f}",
        f"{record['compression']:.2f}x",
    )


def _estimate(figure: dict[str, Any]) -> str:
    """Return a mean with its interval; one text has none."""
    spread = "" if figure["half_width"] is None else f" ± {figure['half_width']:.0e}"
    return f"{figure['mean']:.1e}{spread}"


def _row_with_tail(record: dict[str, Any]) -> tuple[str, ...]:
    label, kl, change, top1, _, *sizes = _row(record)
    tail = (f"{record[name]:.1e}" for name in ("kl_p50", "kl_p99", "kl_p999"))
    key, drift = (record[name]["mean"] for name in ("needle_log_probability", "drift"))
    tasks = ("-" if figure is None else f"{figure:.3f}" for figure in (key, drift))
    return label, kl, *tail, change, top1, *tasks, *sizes
