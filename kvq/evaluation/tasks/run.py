"""The tasks that suit a model, and the scores of several caches on them, full precision first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.text import is_recall_tokenizer
from kvq.evaluation.tasks.english import build_english_tasks
from kvq.evaluation.tasks.records import build_record_tasks
from kvq.evaluation.tasks.scoring import TaskScore, score_tasks
from kvq.evaluation.tasks.task_set import TaskSet

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class CacheScores:
    """The scores of one cache.

    Attributes:
        label: its name in the tables.
        scores: by the task's name; none if the cache cannot serve the model.
        failure: the reason then.
    """

    label: str
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    failure: str | None = None

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain values: for each task the mean log-probability of a token, and shares of what is right."""
        return {
            name: {
                "log_probability": score.mean_log_probability,
                "tokens_right": score.tokens_right,
                "answers_right": score.answers_right,
            }
            for name, score in self.scores.items()
        }


def build_tasks(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, *, length: int, contexts: int
) -> list[TaskSet]:
    """Return the tasks in the words of the embedded model for its tokenizer, else those in English.

    Args:
        tokenizer: the model's tokenizer.
        filler: int64 `[N, L]`, a text that English tasks are hidden in.
        length: tokens of a context and its questions, at most.
        contexts: contexts of each task.

    Raises:
        EvaluationError: the length or the text leaves no room.
    """
    if is_recall_tokenizer(tokenizer):
        return build_record_tasks(length=length, contexts=contexts)
    return build_english_tasks(tokenizer, filler, length=length, contexts=contexts)


def score_caches(
    model: PreTrainedModel,
    tasks: Sequence[TaskSet],
    candidates: Sequence[Candidate],
    *,
    step: int,
    batch_size: int,
    on_progress: Callable[[str], None] = lambda label: None,  # noqa: ARG005
) -> Iterator[CacheScores]:
    """Yield the scores of full precision, then of each candidate, as soon as they are measured.

    Args:
        model: a causal model.
        tasks: the tasks.
        candidates: the caches.
        step: tokens of each forward behind a context.
        batch_size: contexts read together.
        on_progress: called with the label of each cache before it is measured.
    """
    on_progress(FULL_PRECISION)
    sizes = {"step": step, "batch_size": batch_size}
    yield CacheScores(FULL_PRECISION, score_tasks(model, tasks, lambda: DynamicCache(config=model.config), **sizes))
    for candidate in candidates:
        on_progress(candidate.label)
        build = candidate.build
        try:
            scores = score_tasks(model, tasks, lambda build=build: build(model), **sizes)  # type: ignore[misc]
        except Exception as error:
            if not candidate.is_peer:
                raise
            yield CacheScores(candidate.label, failure=f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        yield CacheScores(candidate.label, scores)
