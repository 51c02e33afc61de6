"""The parts of `kvq bench`, each measured under a bar and printed as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvq.cli.console import get_console, print_line, print_table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvq.benchmark.contenders import ContenderChoice
    from kvq.benchmark.models import ModelTrials
    from kvq.benchmark.run import Plan

PROMPT_ROUNDS = 7
"""Warm runs of each prompt, and timed forwards of several tokens."""
PATIENCE = 6
"""Times the limit, what prompts, forwards of several tokens or steps in a row of one contender may take."""


def run_plan(plan: Plan) -> list[dict[str, Any]]:
    """Measure, and print each table as soon as it is complete."""
    from kvq.benchmark.report import COLUMNS, describe_results, list_failures, table_rows, title
    from kvq.benchmark.run import run

    found = []
    with _progress(plan.work) as on_progress:
        for result in run(plan, on_progress):
            (facts,) = describe_results([result])
            found.append(facts)
            _print_part(title(facts), COLUMNS, table_rows(facts), list_failures(facts))
    return found


def time_prompts(
    choice: ContenderChoice, asked: dict[str, Any], device: torch.device, model: PreTrainedModel | None
) -> list[dict[str, Any]]:
    """Measure the time to the first token, at the first batch and dtype that were asked for."""
    from kvq.benchmark.first_token import choose_for_prompts, measure_first_tokens
    from kvq.benchmark.report import FIRST_TOKEN_COLUMNS, first_token_rows, list_failures, title
    from kvq.benchmark.setting import Setting, Shape, find_dtype

    found = []
    shape = Shape(layers=asked["layers"]) if model is None else Shape.of(model.config)
    dtype, name = find_dtype(asked["dtype"][0]), None if model is None else model.name_or_path
    visits = (1 + PROMPT_ROUNDS) * len(choose_for_prompts(choice.contenders()))
    with _progress(visits * asked["batch"][0] * sum(asked["prompt"])) as on_progress:
        for length in sorted(asked["prompt"]):
            setting = Setting(shape, length, asked["batch"][0], dtype, device)
            facts = measure_first_tokens(setting, choice, PROMPT_ROUNDS, name, PATIENCE * asked["limit"], on_progress)
            found.append(facts)
            head = f"{title(facts)}: from the prompt to the first and second token"
            _print_part(head, FIRST_TOKEN_COLUMNS, first_token_rows(facts), list_failures(facts))
    return found


def time_generation(
    plan: Plan, measured: list[dict[str, Any]], asked: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Measure forwards of several tokens and many steps in a row, at each length and the first batch and dtype.

    What took too long, or too much memory, for single steps is left out here as well.
    """
    from kvq.benchmark.generation import (
        WARMUPS,
        Effort,
        Forward,
        choose_for_forwards,
        choose_for_steps,
        measure_forwards,
        measure_steps,
    )
    from kvq.benchmark.report import FORWARD_COLUMNS, STEPS_COLUMNS, forward_rows, list_failures, steps_rows, title

    make_trial, limit_s = cast("ModelTrials", plan.make_trial), PATIENCE * plan.limit_s
    first = plan.settings[0]
    kinds = [*map(Forward, asked["chunk"]), *(Forward(tokens, is_draft=True) for tokens in asked["draft"])]
    parts: dict[str, list[dict[str, Any]]] = {"forwards": [], "steps": []}
    for setting, result in zip(plan.settings, measured, strict=True):
        labels = {one["label"] for one in result["contenders"] if one["step_ms"]}
        if not labels or (setting.batch, setting.dtype) != (first.batch, first.dtype):
            continue
        contenders = [one for one in plan.contenders if one.label in labels]
        several, single = choose_for_forwards(contenders), choose_for_steps(contenders)
        for kind in kinds:
            with _progress(len(several) * (PROMPT_ROUNDS + WARMUPS)) as on_progress:
                effort = Effort(PROMPT_ROUNDS, limit_s, make_trial, on_progress)
                facts = measure_forwards(several, setting, kind, effort)
            parts["forwards"].append(facts)
            what = f"{kind.tokens} tokens at once" + (f", {kind.rejected} taken back" if kind.is_draft else "")
            _print_part(f"{title(facts)}: {what}", FORWARD_COLUMNS, forward_rows(facts), list_failures(facts))
        if asked["steps"]:
            with _progress(len(single) * (asked["steps"] + WARMUPS)) as on_progress:
                effort = Effort(asked["steps"], limit_s, make_trial, on_progress)
                facts = measure_steps(single, setting, effort)
            parts["steps"].append(facts)
            what = f"{asked['steps']} steps in a row"
            _print_part(f"{title(facts)}: {what}", STEPS_COLUMNS, steps_rows(facts), list_failures(facts))
    return parts


def _print_part(head: str, columns: Sequence[str], rows: list[tuple[str, ...]], failures: Iterable[str]) -> None:
    print_line(head)
    print_table(columns, rows)
    for failure in failures:
        print_line(failure)
    print_line()


@contextmanager
def _progress(work: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the time left."""
    left = TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *left
    with Progress(*columns, console=get_console(stderr=True), transient=True) as progress:
        task = progress.add_task("filling", total=work)
        yield lambda label, done: progress.update(task, description=label, advance=done)
