"""The quality targets of kvq beside what was measured on a real model; `make real-targets` measures.

A configuration takes part by a file in benchmarks/targets: its bits say which target it is held to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markdown_table import table
from preset_tables import describe_run
from quality_tables import RESULTS

RESULT = RESULTS / "targets-smollm2.json"
COLUMNS = ("cache", "bits K / V", "smaller", "KL divergence", "of theirs", "text by text", "at least", "aim", "reached")
PEER_BITS = 4

Facts = Mapping[str, Any]
Bits = tuple[float, float]


@dataclass(frozen=True)
class Target:
    """The most that the KL of a configuration may be, as a ratio to that of transformers' best 4-bit cache.

    Attributes:
        required: what it must reach.
        aim: what it should reach.
    """

    required: float
    aim: float

    def judge(self, ratio: float) -> str:
        """Return in words which of the two a ratio reaches."""
        return "aim" if ratio <= self.aim else "at least" if ratio <= self.required else "no"


TARGETS = {(4, 4): Target(0.07, 0.04), (4, 2): Target(0.45, 0.25), (3, 3): Target(0.4, 0.2), (2, 2): Target(4, 2)}
"""By the bits of keys and values."""


def render_targets() -> str:
    """Return the table, with the conditions of the run above it."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    return (
        f"{describe_run(result)}\n\n{table(COLUMNS, target_rows(result['records']), right=range(1, len(COLUMNS) - 1))}"
    )


def target_rows(records: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS` for each cache of transformers and each configuration with a target.

    Raises:
        ValueError: none of transformers' 4-bit caches was measured, with which all are compared.
    """
    measured = [record for record in records if not record["failure"]]
    best = _find_best_peer(measured)
    peers = [_peer_row(record) for record in measured if record["is_peer"]]
    own = [_row(record, best, bits) for bits in TARGETS for record in measured if _bits(record) == bits]
    return [*peers, *own]


def _find_best_peer(records: Sequence[Facts]) -> Facts:
    peers = [one for one in records if one["is_peer"] and one["settings"]["transformers"].get("nbits") == PEER_BITS]
    if not peers:
        raise ValueError(f"no cache of transformers with {PEER_BITS} bits was measured: add --peer quanto-4")
    return min(peers, key=_kl)


def _bits(record: Facts) -> Bits | None:
    return None if record["is_peer"] else (record["settings"]["nbits_k"], record["settings"]["nbits_v"])


def _kl(record: Facts) -> float:
    return float(record["kl"]["mean"])


def _peer_row(record: Facts) -> tuple[str, ...]:
    nbits = record["settings"]["transformers"].get("nbits", 8)
    return record["label"], f"{nbits} / {nbits}", f"{record['compression']:.2f}x", f"{_kl(record):.4f}", *["-"] * 5


def ratios_by_text(record: Facts, other: Facts) -> list[float]:
    """Return the KL of one cache as a share of another's, text by text."""
    return [one / whole for one, whole in zip(record["kl_by_sequence"], other["kl_by_sequence"], strict=True)]


def _row(record: Facts, best: Facts, bits: Bits) -> tuple[str, ...]:
    target, ratio = TARGETS[bits], _kl(record) / _kl(best)
    by_text = ratios_by_text(record, best)
    return (
        f"`{record['label']}`",
        f"{bits[0]:g} / {bits[1]:g}",
        f"{record['compression']:.2f}x",
        f"{_kl(record):.4f}",
        f"{ratio:.3g}x",
        f"{min(by_text):.2g}x to {max(by_text):.2g}x",
        f"{target.required:g}x",
        f"{target.aim:g}x",
        target.judge(ratio),
    )
