"""Rows and tables from the results of `kvq eval`, and the check of the defaults on the toy models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from markdown_table import table

from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.quality.record import judge

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TOYS = {"recall": "the recall model on records and questions", "text": "the text model on source files of Python"}
BEFORE = "before"
TOY_COLUMNS = ("model", "defaults", "KL divergence", "against before", "top-1", "bits K / V", "smaller")
TOY_ROWS = {
    BEFORE: "before: as they are, values per token, window 128",
    "before-short-window": "the same, window 32",
    "today": "today: rotated, balanced, per channel, window 32",
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


def render_toys() -> str:
    """Return what the defaults of today and those before cost on both toy models."""
    rows = [row for toy in TOYS for row in _toy_rows(toy)]
    return table(TOY_COLUMNS, rows, right=range(2, len(TOY_COLUMNS)))


def _toy_rows(toy: str) -> list[tuple[str, ...]]:
    result = json.loads((RESULTS / f"defaults-{toy}.json").read_text(encoding="utf-8"))
    records = {record["label"]: record for record in result["records"]}
    rows = []
    for label, name in TOY_ROWS.items():
        _, kl, _, top1, _, bits, _, smaller = _row(records[label])
        against = "-" if label == BEFORE else compare_rows(records[BEFORE], records[label])
        rows.append((TOYS[toy], name, kl, against, top1, bits, smaller))
    return rows


def compare_rows(chosen: dict[str, Any], instead: dict[str, Any]) -> str:
    """Return the factor by which another choice changes the divergence, and a verdict by the interval over texts."""
    difference = Estimate.of_parts(torch.tensor(instead["kl_by_sequence"]) - torch.tensor(chosen["kl_by_sequence"]))
    return f"{instead['kl']['mean'] / chosen['kl']['mean']:.2f}x, {judge(difference)}"


def quality_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `TAIL_COLUMNS` for each cache that could be measured, best first."""
    measured = [record for record in report["records"] if not record["failure"]]
    return [_row_with_tail(record) for record in sorted(measured, key=lambda record: record["kl"]["mean"])]


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
