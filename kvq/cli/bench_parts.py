"""The parts of `kvq bench`, each table printed and kept as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from kvq.cli.console import print_line, print_table
from kvq.cli.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvq.benchmark.contenders import ContenderChoice
    from kvq.benchmark.models import ModelTrials
    from kvq.benchmark.run import BenchmarkPlan

Keep = Callable[[str, "dict[str, Any]"], None]
"""Takes the name of a part and one of its results."""

PROMPT_ROUNDS = 7
"""Warm runs of each prompt, and timed forwards of several tokens."""
PATIENCE = 6
"""Times the limit: the time that prompts, forwards of several tokens or steps in a row of one contender may take."""


def run_plan(name: str, plan: BenchmarkPlan, progress: Progress, keep: Keep) -> list[dict[str, Any]]:
    """Measure the part of that name; return its results."""
    from kvq.benchmark.report import COLUMNS, describe_results, list_failures, table_rows, title
    from kvq.benchmark.run import run

    found = []
    progress.begin("filling", plan.work, "tokens")
    for result in run(plan, progress.advance):
        (facts,) = describe_results([result])
        found.append(facts)
        _print_part(title(facts), COLUMNS, table_rows(facts), list_failures(facts))
        keep(name, facts)
    return found


def time_prompts(
    choice: ContenderChoice,
    asked: dict[str, Any],
    device: torch.device,
    model: PreTrainedModel | None,
    progress: Progress,
    keep: Keep,
) -> None:
    """Measure the time to the first token, at the first batch and dtype that were asked for."""
    from kvq.benchmark.first_token import choose_for_prompts, measure_first_tokens
    from kvq.benchmark.report import FIRST_TOKEN_COLUMNS, first_token_rows, list_failures, title
    from kvq.benchmark.setting import Setting, Shape, find_dtype

    shape = Shape(layers=asked["layers"]) if model is None else Shape.of(model.config)
    dtype, name = find_dtype(asked["dtype"][0]), None if model is None else model.name_or_path
    visits = (1 + PROMPT_ROUNDS) * len(choose_for_prompts(choice.contenders()))
    progress.begin("filling", visits * asked["batch"][0] * sum(asked["prompt"]), "tokens")
    for length in sorted(asked["prompt"]):
        setting, limit_s = Setting(shape, length, asked["batch"][0], dtype, device), PATIENCE * asked["limit"]
        facts = measure_first_tokens(setting, choice, PROMPT_ROUNDS, name, limit_s, progress.advance)
        head = f"{title(facts)}: from the prompt to the first and second token"
        _print_part(head, FIRST_TOKEN_COLUMNS, first_token_rows(facts), list_failures(facts))
        keep("first_token", facts)


def time_generation(
    plan: BenchmarkPlan, measured: list[dict[str, Any]], asked: dict[str, Any], progress: Progress, keep: Keep
) -> None:
    """Measure forwards of several tokens and many steps in a row, at each length and the first batch and dtype.

    A contender that took too long, or too much memory, for single steps is left out here as well.
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
    for setting, result in zip(plan.settings, measured, strict=True):
        labels = {one["label"] for one in result["contenders"] if one["step_ms"]}
        if not labels or (setting.batch, setting.dtype) != (first.batch, first.dtype):
            continue
        contenders = [one for one in plan.contenders if one.label in labels]
        several, single = choose_for_forwards(contenders), choose_for_steps(contenders)
        for kind in kinds:
            progress.begin("filling", len(several) * (PROMPT_ROUNDS + WARMUPS), "forwards")
            effort = Effort(PROMPT_ROUNDS, limit_s, make_trial, progress.advance)
            facts = measure_forwards(several, setting, kind, effort)
            what = f"{kind.tokens} tokens at once" + (f", {kind.rejected} taken back" if kind.is_draft else "")
            _print_part(f"{title(facts)}: {what}", FORWARD_COLUMNS, forward_rows(facts), list_failures(facts))
            keep("forwards", facts)
        if asked["steps"]:
            progress.begin("filling", len(single) * (asked["steps"] + WARMUPS), "steps")
            effort = Effort(asked["steps"], limit_s, make_trial, progress.advance)
            facts = measure_steps(single, setting, effort)
            what = f"{asked['steps']} steps in a row"
            _print_part(f"{title(facts)}: {what}", STEPS_COLUMNS, steps_rows(facts), list_failures(facts))
            keep("steps", facts)


def _print_part(head: str, columns: Sequence[str], rows: list[tuple[str, ...]], failures: Iterable[str]) -> None:
    print_line(head)
    print_table(columns, rows)
    for failure in failures:
        print_line(failure)
    print_line()
