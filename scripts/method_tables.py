"""The tables of docs/method.md, from benchmarks/results/method-smollm2.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markdown_table import table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "method-smollm2.json"
PEERS = ("transformers quanto 4 chunk 32", "transformers hqq 4 chunk 32", "transformers quanto 2 chunk 32")
WIDTHS = ("4/4", "4/2", "3/3", "2/2")
ROTATION = ("plain", "rot kv", "rot kv, v channel")
BALANCE = (
    "rot kv",
    "bal k, rot v token",
    "bal kv, v token",
    "bal kv, v channel",
    "bal row kv",
    "bal kv r6",
    "bal kv r4",
)
METADATA = ("rot kv", "rot g64 s8 m8", "rot g64 s6 m6", "rot g64 s8 m0", "rot g32 s8 m8", "rot g128 s8 m8")
METADATA += ("bal kv, v channel", "join g64 s8 m8", "join g64 s6 m6", "join g32 s8 m8", "join g128 s8 m8")
ROUNDING = ("rot kv", "rot k mse", "rot k asym", "rot k ls", "rot k 0.9", "rot v asym", "rot v ls")
ROUNDING += ("bal kv, v channel", "bal k asym", "bal k 0.9", "bal v ls")
WINDOWS = ("window 0 sinks 4", "window 32 sinks 4", "window 64 sinks 4", "window 128 sinks 4")
WINDOWS += ("window 32 sinks 0", "window 32 sinks 16")
TEXTS = ("choose", "report", "other")


def render_method() -> str:
    """Return all tables."""
    parts = [
        "**Rotation.**",
        _table(ROTATION, WIDTHS),
        "In the same run, caches as transformers has them, 4 and 2 bits:",
        table(("cache", *TEXTS), [(name.removesuffix(" chunk 32"), *_kls(name)) for name in PEERS], right=range(1, 4)),
        "**A factor for each token** (`bal`), after the rotation.",
        _table(BALANCE, WIDTHS),
        "**Scales and mids in fewer bits** (`s`, `m`: their bits; `g`: tokens of a group; `join`: "
        "`bal kv, v channel` with factors in 6 bits and 2 rounds).",
        _table(METADATA, ("4/4", "3/3", "2/2")),
        "**Rounding with the least error instead of the whole range.**",
        _table(ROUNDING, ("3/3", "2/2")),
        "**Window and sinks**, rotated, 3/3: all bits of an element, window and sinks included, and KL on `report` and "
        "on longer texts, whose last 1,024 tokens count.",
        table(WINDOW_COLUMNS, [_window_row(name) for name in WINDOWS], right=range(1, len(WINDOW_COLUMNS))),
    ]
    return "\n\n".join(parts)


WINDOW_COLUMNS = ("held exactly", "bits at 1,280", "KL", "bits at 4,096", "KL", "bits at 8,192", "KL")


@cache
def load_configurations() -> dict[str, dict[str, Any]]:
    """Return what was measured, by name."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["configurations"]
    return {one["name"]: one for one in found}


def _table(names: Sequence[str], widths: Sequence[str]) -> str:
    header = ("cache", *(f"{width}: bits, KL" for width in widths))
    return table(header, [(name, *_cells(name, widths)) for name in names], right=range(1, len(header)))


def _cells(name: str, widths: Iterable[str]) -> Iterable[str]:
    for width in widths:
        one = load_configurations().get(f"{name} {width}")
        yield "" if one is None else f"{one['bits_64']:.2f}, {_kl(one['texts']['report'])}"


def _kls(name: str) -> Iterable[str]:
    return [_kl(load_configurations()[name]["texts"][text]) for text in TEXTS]


def _window_row(name: str) -> tuple[str, ...]:
    texts = load_configurations()[f"rot {name} 3/3"]["texts"]
    cells = [cell for text in ("report", "4k", "8k") for cell in (f"{texts[text]['bits_all']:.2f}", _kl(texts[text]))]
    return (name, *cells)


def _kl(facts: dict[str, Any]) -> str:
    return f"{facts['kl']:.4f}" if facts["kl"] < 0.1 else f"{facts['kl']:.3f}"
