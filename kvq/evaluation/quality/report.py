"""Records as a table and as a JSON document."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kvq.evaluation.quality.candidates import find_window
from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.record import QualityRecord, compare_kl, judge
from kvq.registry.requirements import find_versions

FORMAT = 2
"""Of the JSON document. Files without the field are of format 1, which has no `kl_p50`, `kl_p999`, `spread`,
`by_depth`, scored needles and continuations; its `needle` asked one question a context."""
COLUMNS = (
    "cache",
    "perplexity",
    "change",
    "KL (95 %)",
    "median",
    "99 %",
    "99.9 %",
    "top-1",
    "bits K / V",
    "held",
    "smaller",
)
LEGEND = (
    "KL: how far the next token's probabilities are from those in full precision, 0 if equal: mean, then percentiles",
    "change: of the perplexity; top-1: how often both would say the same token; smaller: all bytes held",
)
"""What the columns are, for who sees them first."""
TASK_COLUMNS = (
    "cache",
    "key, log p (95 %)",
    "key, tokens right",
    "answers right",
    "first difference",
    "unchanged",
    "drift (95 %)",
)
DETAIL_COLUMNS = (
    "cache",
    "KL by position, oldest first",
    "error of states by distance, nearest first",
    "answers right by depth",
)
DEPTH_COLUMNS = ("cache", "positions", "perplexity", "change", "KL (95 %)", "median", "99 %", "99.9 %", "top-1")


def describe_plan(plan: EvaluationPlan, model_name: str) -> list[str]:
    """Return in words what is read, and how."""
    count, length = plan.text.sequences.shape
    scored = count * len(plan.positions)
    lines = [
        f"{model_name} on {plan.text.name}: {count} {'sequence' if count == 1 else 'sequences'} of {length:,} tokens, "
        f"{scored:,} of them scored",
        f"the first {plan.prefill:,} tokens of each in full precision, the rest from the cache in steps of {plan.step}",
        *_list_flattered(plan),
    ]
    if plan.needle_count:
        contexts = "1 context" if plan.needle_count == 1 else f"{plan.needle_count} contexts"
        lines.append(f"{contexts} with five facts; answers are scored, not written")
    if plan.continuation:
        lines.append(
            f"a greedy continuation of {plan.continuation} tokens behind {plan.prompt_length:,} of each sequence"
        )
    return lines


def _list_flattered(plan: EvaluationPlan) -> list[str]:
    """Return a line about caches whose window is shorter than a step, whose own tokens are always seen exactly."""
    windows = {one.label: find_window(one, plan.model) for one in plan.candidates}
    short = [label for label, window in windows.items() if window is not None and max(1, window) < plan.step]
    if not short:
        return []
    return [f"the step is longer than the window of {', '.join(short)}: --step 1 reads as generation does"]


def table_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `COLUMNS` for full precision and for each record."""
    measured = _measured(records)
    return [*map(plain_row, measured[:1]), *map(table_row, measured)]


def plain_row(record: QualityRecord) -> tuple[str, ...]:
    """Return the cells of full precision, with which every record was compared."""
    held = _mebibytes(record.full_precision_bytes)
    return "full precision", f"{record.reference_perplexity:.4g}", *["-"] * 7, held, "1.00x"


def column_widths(labels: Sequence[str]) -> tuple[int, ...]:
    """Return how wide the cells under `COLUMNS` may become, in characters."""
    return max(map(len, ("full precision", *labels))), 10, 10, 17, 8, 8, 8, 7, 13, 12, 7


def task_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `TASK_COLUMNS` for full precision and for each record; none if nothing was asked."""
    measured = [record for record in _measured(records) if record.needle_by_depth or _has_written(record)]
    return [*map(_plain_task_row, measured[:1]), *map(_task_row, measured)]


def detail_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `DETAIL_COLUMNS` for each record: drift, and the error by place."""
    return [
        (
            record.label,
            _figures(record.kl_by_position),
            _figures(record.error_by_distance or ()),
            " ".join(f"{depth}: {rate:.0%}" for depth, rate in record.needle_by_depth.items()) or "-",
        )
        for record in _measured(records)
    ]


def depth_rows(records: Sequence[QualityRecord]) -> list[tuple[str, ...]]:
    """Return a row of cells under `DEPTH_COLUMNS` for each record and run of positions."""
    return [
        (
            record.label,
            f"{run.first:,} to {run.last:,}",
            f"{run.perplexity:.4g}",
            f"{run.perplexity / run.reference_perplexity - 1:+.2%}",
            str(run.kl),
            f"{run.kl_p50:.1e}",
            f"{run.kl_p99:.1e}",
            f"{run.kl_p999:.1e}",
            f"{run.top1:.2%}",
        )
        for record in _measured(records)
        for run in record.by_depth
    ]


def list_ties(records: Sequence[QualityRecord]) -> list[str]:
    """Return a line for each pair of neighbours in divergence whose difference is within the spread over sequences.

    One sequence has no spread: a single line says so, since no difference can be judged then.
    """
    ordered = sorted(_measured(records), key=lambda record: record.kl.mean)
    if len(ordered) > 1 and count_read(ordered) == 1:
        return ["one sequence has no spread: it does not tell whether the caches differ on other texts"]
    return [
        f"a tie within the spread over sequences: {one.label} and {other.label}"
        for one, other in pairwise(ordered)
        if judge(compare_kl(other, one)) == "tie"
    ]


def describe_left_out(plan: EvaluationPlan, records: Sequence[QualityRecord]) -> str | None:
    """Return a line about the sequences that no cache has read, for lack of time; None if there are none."""
    planned, read = len(plan.text.sequences), count_read(records)
    if not _measured(records) or read == planned:
        return None
    return (
        f"left out for lack of time: {planned - read} of {planned} sequences{_describe_shares(plan)}, for every cache "
        f"alike; all figures are of the other {read}"
    )


def _describe_shares(plan: EvaluationPlan) -> str:
    shares = [name for name, count in (("questions", plan.needle_count), ("continuations", plan.continuation)) if count]
    return f", with their share of {' and '.join(shares)}" if shares else ""


def count_read(records: Sequence[QualityRecord]) -> int:
    """Return how many sequences were read, by every cache that could be measured."""
    return max((len(record.kl_by_sequence) for record in _measured(records)), default=0)


def list_failures(records: Sequence[QualityRecord]) -> list[str]:
    """Return a line for each cache that could not be measured."""
    return [f"{record.label}: not measured: {record.failure}" for record in records if record.failure]


def describe_run(plan: EvaluationPlan, model_name: str, records: Sequence[QualityRecord]) -> dict[str, Any]:
    """Return all results and the conditions of the run, as plain values."""
    return {
        "format": FORMAT,
        "model": model_name,
        "dtype": str(plan.model.dtype).removeprefix("torch."),
        "text": plan.text.name,
        "text_digest": plan.text.digest,
        "sequences": count_read(records) or len(plan.text.sequences),
        "sequences_planned": len(plan.text.sequences),
        "length": plan.text.sequences.shape[1],
        "prefill": plan.prefill,
        "step": plan.step,
        "needle_contexts": plan.needle_count,
        "continuation": plan.continuation,
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
        f"{record.kl_p50:.1e}",
        f"{record.kl_p99:.1e}",
        f"{record.kl_p999:.1e}",
        f"{record.top1:.2%}",
        bits,
        _mebibytes(record.held_bytes),
        f"{record.compression:.2f}x",
    )


def _plain_task_row(record: QualityRecord) -> tuple[str, ...]:
    likely = record.reference_needle_log_probability
    shares = _rate(record.reference_needle_tokens), _rate(record.reference_needle)
    return "full precision", "-" if math.isnan(likely) else f"{likely:.3f}", *shares, "-", "-", "-"


def _task_row(record: QualityRecord) -> tuple[str, ...]:
    return (
        record.label,
        _signed(record.needle_log_probability),
        _rate(record.needle_tokens),
        _rate(record.needle),
        _describe_first_difference(record),
        _rate(record.unchanged),
        _signed(record.drift),
    )


def _describe_first_difference(record: QualityRecord) -> str:
    if not _has_written(record):
        return "-"
    low, median, high = ("none" if math.isinf(place) else f"{place:.0f}" for place in record.first_difference)
    return f"{median} ({low} to {high})"


def _has_written(record: QualityRecord) -> bool:
    return not math.isnan(record.unchanged)


def _measured(records: Sequence[QualityRecord]) -> list[QualityRecord]:
    return [record for record in records if not record.failure]


def _signed(figure: Estimate) -> str:
    spread = "" if math.isnan(figure.half_width) else f" ± {figure.half_width:.3f}"
    return "-" if math.isnan(figure.mean) else f"{figure.mean:.3f}{spread}"


def _figures(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.1e}" if number else "0" for number in numbers) or "-"


def _rate(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
