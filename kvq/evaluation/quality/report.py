"""Records as a table and as a JSON document."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

from kvq.evaluation.quality.record import QualityRecord
from kvq.evaluation.quality.run import EvaluationPlan
from kvq.registry.requirements import find_versions

COLUMNS = (
    "cache",
    "perplexity",
    "change",
    "KL (95 %)",
    "KL p99",
    "top-1",
    "needle",
    "bits K / V",
    "held",
    "smaller",
)
DETAIL_COLUMNS = (
    "cache",
    "KL by position, oldest first",
    "error of states by distance, nearest first",
    "needle by depth",
)


def table_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS` for full precision and for each record."""
    measured = [record for record in records if not record.failure]
    return [*map(plain_row, measured[:1]), *map(table_row, measured)]


def plain_row(record: QualityRecord) -> tuple[str, ...]:
    """Return the cells of full precision, with which every record was compared."""
    needle, held = _rate(record.reference_needle), _mebibytes(record.full_precision_bytes)
    return "full precision", f"{record.reference_perplexity:.4g}", *["-"] * 4, needle, "-", held, "1.00x"


def column_widths(labels: Sequence[str]) -> tuple[int, ...]:
    """Return how wide the cells under `COLUMNS` may become, in characters."""
    return max(map(len, ("full precision", *labels))), 10, 10, 17, 8, 7, 6, 13, 12, 7


def detail_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `DETAIL_COLUMNS` for each record: drift, and the error by place."""
    return [
        (
            record.label,
            _figures(record.kl_by_position),
            _figures(record.error_by_distance or ()),
            " ".join(f"{depth}: {rate:.0%}" for depth, rate in record.needle_by_depth.items()) or "-",
        )
        for record in records
        if not record.failure
    ]


def list_failures(records: Sequence[QualityRecord]) -> list[str]:
    """Return a line for each cache that could not be measured."""
    return [f"{record.label}: not measured: {record.failure}" for record in records if record.failure]


def describe_run(plan: EvaluationPlan, model_name: str, records: Sequence[QualityRecord]) -> dict[str, Any]:
    """Return all results and the conditions of the run, as plain values."""
    return {
        "model": model_name,
        "dtype": str(plan.model.dtype).removeprefix("torch."),
        "text": plan.text.name,
        "text_digest": plan.text.digest,
        "sequences": len(plan.text.sequences),
        "length": plan.text.sequences.shape[1],
        "prefill": plan.prefill,
        "step": plan.step,
        "machine": f"{platform.system()} {platform.machine()}, {plan.model.device.type}",
        "python": platform.python_version(),
        "versions": find_versions(),
        "records": [record.to_dict() for record in records],
    }


def table_row(record: QualityRecord) -> tuple[str, ...]:
    """Return the cells of a record."""
    bits = "-" if record.bits_key is None else f"{record.bits_key:.2f} / {record.bits_value:.2f}"
    return (
        record.label,
        f"{record.perplexity:.4g}",
        f"{record.ppl_change:+.2%}",
        str(record.kl),
        f"{record.kl_p99:.2e}",
        f"{record.top1:.2%}",
        _rate(record.needle),
        bits,
        _mebibytes(record.held_bytes),
        f"{record.compression:.2f}x",
    )


def _figures(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.1e}" if number else "0" for number in numbers) or "-"


def _rate(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
