"""What rotating and balancing cost in a decode step; docs/measurements.md has the command that measures it."""

from __future__ import annotations

import json
from typing import Any

from markdown_table import table
from quality_tables import RESULTS
from speed_tables import describe_machine

from kvq.benchmark.statistics import ratio

RESULT = RESULTS / "steps-balance.json"
BASE = "kvq plain, fused"
COLUMNS = ("cache, read by the compiled kernel", "dtype", "step ms", "against plain", "flush ms")


def render_steps() -> str:
    """Return the time of a step of each cache, and the ratio to that of the plain one in the same round."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [row for facts in result["layer"] for row in _rows(facts)]
    facts = result["layer"][0]
    told = f"One layer, {facts['length']:,} tokens, batch {facts['batch']}: {describe_machine(result)}"
    return f"{told}\n\n{table(COLUMNS, rows, right=(2, 3, 4))}"


def _rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    fused = [one for one in facts["contenders"] if one["label"].endswith(", fused")]
    base = next(one for one in fused if one["label"] == BASE)["samples_ms"]["step"]
    rows = []
    for one in fused:
        spread = ratio(one["samples_ms"]["step"], base)
        name = one["label"].removeprefix("kvq ").removesuffix(", fused")
        against = "1" if one["label"] == BASE else f"{spread.median:.2f}x ({spread.low:.2f} to {spread.high:.2f})"
        rows.append((f"`{name}`", facts["dtype"], f"{one['step_ms']['median']:.2f}", against, _flush(one)))
    return rows


def _flush(one: dict[str, Any]) -> str:
    return f"{one['flush_ms']['median']:.1f}" if one["flush_ms"] else "-"
