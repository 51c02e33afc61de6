"""`kvq demo --model`: what caches change in a text that a language model reads and continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvq.cli.console import GrowingTable, one_line, print_line
from kvq.cli.progress import Progress
from kvq.cli.usage_errors import usage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvq.evaluation.model_demo import ModelDemoRow
    from kvq.evaluation.quality.plan import EvaluationPlan
    from kvq.evaluation.quality.record import QualityRecord
    from kvq.plugin_api.backend_spec import BackendSpec

COLUMNS = ("cache", "KL", "same token", "bits held (K / V)", "held", "smaller")
PLAIN = "full precision"
PARTED = " | "
"""Stands where a continuation parts from full precision's."""


def show_model_demo(name: str, backends: Sequence[BackendSpec], progress: Progress) -> None:
    """Measure the backends on a model, and print a table and the continuations; a wrong model ends the command."""
    with usage_errors():
        from kvq.evaluation.demo import list_cases
        from kvq.evaluation.model_demo import plan_demo
        from kvq.evaluation.model_loading import describe_model, load_model

        model, tokenizer = load_model(name, on_step=lambda step: progress.advance(step, 0))
        plan = plan_demo(model, tokenizer, list_cases(backends))
    rows = _run(plan, describe_model(name), progress)
    _print_continuations(rows, tokenizer)


def _run(plan: EvaluationPlan, title: str, progress: Progress) -> list[ModelDemoRow]:
    """Measure the caches, and print their rows as they come."""
    from kvq.evaluation.model_demo import run_demo
    from kvq.evaluation.quality.report import describe_plan

    progress.begin(PLAIN, plan.units, "forwards")
    for line in describe_plan(plan, title):
        print_line(line)
    print_line("KL: of the next token from full precision; same token: how often both would say it")
    width = max(len(name) for name in (PLAIN, *(one.label for one in plan.candidates)))
    table = GrowingTable(COLUMNS, [width, 7, 6, 13, 12, 6])
    rows: list[ModelDemoRow] = []
    for row in run_demo(plan, progress.advance):
        if not rows:
            table.add((PLAIN, "-", "-", "-", f"{row.record.full_precision_bytes / 2**20:.2f} MiB", "1.00x"))
        rows.append(row)
        table.add(_cells(row.record))
    return rows


def _cells(record: QualityRecord) -> tuple[str, ...]:
    return (
        record.label,
        f"{record.kl.mean:.1e}",
        f"{record.top1:.1%}",
        f"{record.bits_key:.2f} / {record.bits_value:.2f}",
        f"{record.held_bytes / 2**20:.2f} MiB",
        f"{record.compression:.2f}x",
    )


def _print_continuations(rows: Sequence[ModelDemoRow], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print how full precision goes on, and where each cache says something else."""
    if not rows:
        return
    width = max(len(PLAIN), *(len(row.record.label) for row in rows))
    expected = rows[0].continuation.expected
    print_line()
    print_line(f"The text as it goes on, {len(expected)} tokens;{PARTED.rstrip()} where a cache says something else:")
    print_line(f"{PLAIN:>{width}}: {_decode(tokenizer, expected)}")
    for row in rows:
        print_line(f"{row.record.label:>{width}}: {_describe_continuation(row, tokenizer)}")


def _describe_continuation(row: ModelDemoRow, tokenizer: PreTrainedTokenizerBase) -> str:
    one = row.continuation
    if math.isinf(one.first_difference):
        return "the same"
    equal = int(one.first_difference)
    parts = (_decode(tokenizer, one.said[:equal]), _decode(tokenizer, one.said[equal:]))
    return f"parts after {equal} {'token' if equal == 1 else 'tokens'}: {PARTED.join(parts)}"


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens))
    return one_line(str(text))
