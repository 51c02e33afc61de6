"""The tables of README.md about quality, from the results that `scripts/measure_quality.py report` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TEXTS = {
    "stdlib": "the text model on source files of Python that it has not seen",
    "recall": "the recall model on records and questions about them",
}
COLUMNS = ("cache", "KL divergence", "perplexity", "top-1", "needle", "bits K / V", "KiB held", "smaller")
COMPARISONS = ("ours", "theirs", "bytes", "KL divergence", "difference, 95 % interval", "verdict")


def load_report(text: str) -> dict[str, Any]:
    """Return the results of one kind of text."""
    found: dict[str, Any] = json.loads((RESULTS / f"quality_report_{text}.json").read_text(encoding="utf-8"))
    return found


def quality_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS` for each cache that could be measured, best first."""
    measured = [record for record in report["records"] if not record["failure"]]
    return [_row(record) for record in sorted(measured, key=lambda record: record["kl"]["mean"])]


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
        f"{record['kl']['mean']:.1e} ± {record['kl']['half_width']:.0e}",
        f"{record['ppl_change']:+.2%}",
        f"{record['top1']:.1%}",
        "-" if needle is None else f"{needle:.0%}",
        "-" if keys is None else f"{keys:.2f} / {record['bits_value']:.2f}",
        f"{record['held_bytes'] / 1024:,.0f}",
        f"{record['compression']:.2f}x",
    )
