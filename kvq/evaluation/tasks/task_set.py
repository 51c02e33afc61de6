"""Contexts of one task, each with questions behind it and their right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_ANSWER = -1
"""Marks a token of a tail that belongs to no answer."""


@dataclass(frozen=True)
class Question:
    """A question in tokens, and the tokens that answer it."""

    ask: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True)
class TaskSet:
    """Contexts of one task and the questions about them.

    Attributes:
        name: the task's name.
        contexts: int64 `[B, C]`.
        tails: int64 `[B, T]`, questions with their right answers; shorter ones are filled up behind, with token 0.
        answer_of: int64 `[B, T]`, the number of the answer that a token belongs to, or `NO_ANSWER`.
    """

    name: str
    contexts: torch.Tensor
    tails: torch.Tensor
    answer_of: torch.Tensor

    @property
    def answers(self) -> int:
        """Number of answers, in all contexts together."""
        return sum(int(row.max()) + 1 for row in self.answer_of)


def build_task_set(name: str, contexts: Sequence[Sequence[int]], questions: Sequence[Sequence[Question]]) -> TaskSet:
    """Return a task set of contexts of equal length, and of the questions about each, in the order they are asked."""
    tails, marks = zip(*(_join(asked) for asked in questions), strict=True)
    longest = max(map(len, tails))
    filled = [[*row, *[0] * (longest - len(row))] for row in tails]
    answer_of = [[*row, *[NO_ANSWER] * (longest - len(row))] for row in marks]
    return TaskSet(name, torch.tensor(contexts), torch.tensor(filled), torch.tensor(answer_of))


def _join(questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    tail: list[int] = []
    marks: list[int] = []
    for number, question in enumerate(questions):
        tail += [*question.ask, *question.answer]
        marks += [*[NO_ANSWER] * len(question.ask), *[number] * len(question.answer)]
    return tail, marks
