"""Results as a table and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvq.benchmark.clock import memory_tool
from kvq.benchmark.contenders import BUFFER, DYNAMIC
from kvq.benchmark.kernel_record import summarize_kernel
from kvq.benchmark.machine import describe_machine
from kvq.benchmark.run import SettingResult
from kvq.units import format_bytes

FIRST_TOKEN_COLUMNS = ("cache", "first token cold s", "second ms", "first token warm s", "second ms")
FORMAT = 1
"""Version of the JSON document's format."""

FORWARD_COLUMNS = ("cache", "ms", f"time against {DYNAMIC}", f"against the {BUFFER}", "transient", "read by")
STEPS_COLUMNS = ("cache", "median ms", "99th percentile ms", "longest ms", "percentile / median")

COLUMNS = ("cache", "step ms", f"time against the {BUFFER}", "flush ms", "with its share", "transient", "held")


def describe_results(results: Sequence[SettingResult]) -> list[dict[str, Any]]:
    """Return results as plain values."""
    return [
        {
            **result.setting.to_dict(),
            "shape": asdict(result.setting.shape),
            "failure": result.failure,
            "contenders": [one.to_dict(result.find(BUFFER), result.find(DYNAMIC)) for one in result.measured],
        }
        for result in results
    ]


def describe_run(
    device: torch.device, options: Mapping[str, Any], parts: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return all results and the conditions of the run, as plain values.

    Args:
        device: the device that was measured.
        options: the command's options.
        parts: results by part: `layer`, `model`, `deep`, `first_token`.
    """
    return {
        "format": FORMAT,
        "machine": describe_machine(device),
        "options": dict(options),
        "memory_tool": memory_tool(device),
        "proof": summarize_kernel(parts.get("layer", ()), device),
        **{name: list(part) for name, part in parts.items()},
    }


def title(facts: Mapping[str, Any]) -> str:
    """Return a line that names the conditions of one result."""
    layers = facts["shape"]["layers"]
    what = "one layer" if layers == 1 else f"a model of {layers} layers"
    return f"{what}, {facts['length']:,} tokens, batch {facts['batch']}, {facts['dtype']}"


def table_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS` for each contender of one result that was measured."""
    return [_row(one) for one in facts["contenders"] if one["step_ms"] is not None]


def list_failures(facts: Mapping[str, Any]) -> Iterable[str]:
    """Yield a line for each contender that was left out of one result, with the reason."""
    if facts.get("failure"):
        yield f"{title(facts)}: {facts['failure']}"
    for one in facts["contenders"]:
        if one["failure"]:
            yield f"{one['label']}: {one['failure']}"


def first_token_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `FIRST_TOKEN_COLUMNS` for each contender that was measured."""
    rows = []
    for one in facts["contenders"]:
        cold, warm = one["cold_ms"], one["warm_ms"]
        if cold is None or warm is None:
            continue
        times = cold["first"], cold["second"], warm["first"]["median"], warm["second"]["median"]
        rows.append(
            (
                one["label"],
                *(f"{time / 1e3:.2f}" if place % 2 == 0 else milliseconds(time) for place, time in enumerate(times)),
            )
        )
    return rows


def forward_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `FORWARD_COLUMNS` for each contender that was measured."""
    return [
        (
            one["label"],
            milliseconds(one["time_ms"]["median"]),
            spread_text(one["to_dynamic"]),
            spread_text(one["to_buffer"]),
            format_bytes(one["transient_bytes"]),
            one["kernel"] or "-",
        )
        for one in facts["contenders"]
        if one["time_ms"]
    ]


def steps_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of cells under `STEPS_COLUMNS` for each contender that was measured."""
    return [
        (
            one["label"],
            *(milliseconds(one[name]) for name in ("median_ms", "p99_ms", "longest_ms")),
            f"{one['p99_to_median']:.2f}",
        )
        for one in facts["contenders"]
        if one["median_ms"]
    ]


def spread_text(spread: Mapping[str, float] | None) -> str:
    """Return a median with its interval, or a dash."""
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def compare(one: Mapping[str, Any]) -> str:
    """Return a ratio to the buffer with its interval; a tie is called one."""
    ratio = one["to_buffer"]
    if one["label"] == BUFFER or ratio is None:
        return "1" if one["label"] == BUFFER else "-"
    return f"{spread_text(ratio)}, a tie" if one["is_tie"] else spread_text(ratio)


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    flush = one["flush_ms"]
    return (
        one["label"],
        milliseconds(one["step_ms"]["median"]),
        compare(one),
        milliseconds(flush["median"]) if flush else "-",
        milliseconds(one["amortized_ms"]) if flush else "-",
        format_bytes(one["transient_bytes"]) if one["transient_bytes"] is not None else "-",
        format_bytes(one["held_bytes"]),
    )


def milliseconds(value: float) -> str:
    """Return a time with three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
