"""The task that the embedded model can do, in its own words: several needles, records that are asked for."""

from __future__ import annotations

import torch

from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.quality.text import MAX_RECORDS
from kvq.evaluation.tasks.task_set import Question, TaskSet, build_task_set

QUESTIONS = 16
"""Records that are asked for in each context."""


def build_record_tasks(*, length: int, contexts: int, seed: int = 0) -> list[TaskSet]:
    """Return the task "several needles" in the words of the embedded model, which knows no other task.

    Args:
        length: tokens of a context and its questions, at most.
        contexts: number of contexts.
        seed: seed of records and questions.

    Raises:
        EvaluationError: the length leaves no room.
    """
    room = length - 1 - QUESTIONS * recall.QUESTION_LENGTH
    records = min(MAX_RECORDS, room // recall.RECORD_LENGTH)
    if records < QUESTIONS:
        raise EvaluationError(f"{length} tokens leave no room for the tasks; ask for at least 256")
    generator = torch.Generator().manual_seed(seed)
    batch = recall.sample_recall_batch(contexts, records, QUESTIONS, generator=generator)
    asked = [[_divide(question, number) for number, question in enumerate(row)] for row in batch.questions.tolist()]
    return [build_task_set("several needles", batch.context.tolist(), asked)]


def _divide(question: list[int], number: int) -> Question:
    """Return `? Name`, behind the full stop of the question before, and the answer."""
    stop = [recall.STOP] if number else []
    return Question([*stop, *question[:2]], question[2 : 2 + recall.ANSWER_LENGTH])
