"""The part of `kvq eval` that `--tasks` adds: synthetic tasks, as a table of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvq.cli.console import print_line, print_table
from kvq.cli.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvq.evaluation.quality.run import EvaluationPlan
    from kvq.evaluation.tasks.run import CacheScores
    from kvq.evaluation.tasks.task_set import TaskSet


def make_tasks(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, contexts: int) -> list[TaskSet]:
    """Return the tasks, as long as the sequences of the plan, hidden in its text; none for 0 contexts."""
    from kvq.evaluation.tasks.run import build_tasks

    text = plan.text.sequences
    return build_tasks(tokenizer, text, length=text.shape[1], contexts=contexts) if contexts else []


def score_plan(plan: EvaluationPlan, tasks: list[TaskSet], progress: Progress) -> list[CacheScores]:
    """Return the scores of full precision and of every cache of the plan."""
    from kvq.evaluation.tasks.run import score_caches

    if not tasks:
        return []
    progress.begin("tasks", len(plan.candidates) + 1, "caches")
    found = []
    sizes = {"step": plan.step, "batch_size": plan.batch_size}
    for scores in score_caches(
        plan.model, tasks, plan.candidates, on_progress=lambda label: progress.advance(f"tasks, {label}", 0), **sizes
    ):
        progress.advance(scores.label)
        found.append(scores)
    return found


def show_scores(found: list[CacheScores]) -> None:
    """Print a row for each cache that could be measured."""
    if not found:
        return
    names = list(found[0].scores)
    print_line()
    print_line("tasks: log-probability of each token of the answers, and answers that are right to the last token")
    print_table(("cache", *names), [(one.label, *map(_cell, one.to_dict().values())) for one in found if one.scores])


def _cell(figures: dict[str, float]) -> str:
    return f"{figures['log_probability']:.3f}, {figures['answers_right']:.1%}"
