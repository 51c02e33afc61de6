"""Keys rounded to nearest beside keys rounded for their queries, on a real model; `make real-rounding` measures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import table
from quality_tables import RESULTS
from quality_targets import ratios_by_text

from kvq.config.rounding_choice import ERROR_FEEDBACK, NEAREST, ROUNDING_FIELD

RESULT = RESULTS / "rounding-smollm2.json"
"""A run by name: the text, and what of the cache is quantized."""
COLUMNS = ("text", "bits K / V", "smaller", "nearest", "error feedback", "of nearest", "text by text")

Facts = Mapping[str, Any]


def render_rounding() -> str:
    """Return the KL of each pair of caches that differ in rounding alone, over all runs."""
    runs = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [(f"`{run['text']}`", *row) for run in runs.values() for row in rounding_rows(run["records"])]
    return table(COLUMNS, rows, right=range(2, len(COLUMNS)))


def rounding_rows(records: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS`, but for the text, for each pair of one run; most bits first.

    Raises:
        ValueError: one of a pair was not measured, or the two do not hold the same bytes.
    """
    pairs: dict[tuple[float, float], dict[str, Facts]] = {}
    for record in records:
        settings = record["settings"]
        pairs.setdefault((settings["nbits_k"], settings["nbits_v"]), {})[settings[ROUNDING_FIELD]] = record
    return [_row(bits, pairs[bits]) for bits in sorted(pairs, reverse=True)]


def _row(bits: tuple[float, float], pair: Mapping[str, Facts]) -> tuple[str, ...]:
    if pair.keys() != {NEAREST, ERROR_FEEDBACK} or len({record["held_bytes"] for record in pair.values()}) > 1:
        raise ValueError(f"bits {bits}: one cache of each rounding is needed, of the same bytes")
    nearest, chosen = pair[NEAREST], pair[ERROR_FEEDBACK]
    by_text = ratios_by_text(chosen, nearest)
    return (
        f"{bits[0]:g} / {bits[1]:g}",
        f"{nearest['compression']:.2f}x",
        *(_kl(record) for record in (nearest, chosen)),
        f"{chosen['kl']['mean'] / nearest['kl']['mean']:.2f}x",
        f"{min(by_text):.2f}x to {max(by_text):.2f}x",
    )


def _kl(record: Facts) -> str:
    return f"{record['kl']['mean']:.5f}"
