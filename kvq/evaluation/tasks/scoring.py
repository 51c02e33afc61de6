"""Scores of a cache on tasks, teacher-forced: every answer is read after the right tokens before it.

What a small model says freely is noise at long contexts; the probability that it gives to the right answer is not. The
context is read at once, the questions in short steps behind it, from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention.hint import without_hint
from kvq.evaluation.quality.forcing import force_tokens
from kvq.evaluation.tasks.task_set import NO_ANSWER, TaskSet


@dataclass(frozen=True)
class TaskScore:
    """The score of one cache on one task.

    Attributes:
        log_probability: of each token of an answer, in nats, float32 `[N]`, context after context.
        right: whether that token is the most likely one, bool `[N]`.
        answer_of: the answer that each token belongs to, counted over all contexts, int64 `[N]`.
    """

    log_probability: torch.Tensor
    right: torch.Tensor
    answer_of: torch.Tensor

    @property
    def mean_log_probability(self) -> float:
        """Mean over the tokens of all answers, in nats; at most 0."""
        return self.log_probability.mean().item()

    @property
    def tokens_right(self) -> float:
        """Share of the answers' tokens that are the most likely ones."""
        return self.right.float().mean().item()

    @property
    def answers_right(self) -> float:
        """Share of the answers of which every token is the most likely one, as greedy generation would give them."""
        wrong = torch.zeros(int(self.answer_of.max()) + 1).index_add(0, self.answer_of, (~self.right).float())
        return (wrong == 0).float().mean().item()


def score_tasks(
    model: PreTrainedModel,
    tasks: Sequence[TaskSet],
    make_cache: Callable[[], Cache],
    *,
    step: int = 16,
    batch_size: int = 1,
) -> dict[str, TaskScore]:
    """Return the score of a kind of cache on each task, by its name.

    Args:
        model: a causal model.
        tasks: the tasks.
        make_cache: makes an empty cache.
        step: tokens of each forward behind the context. They see each other exactly: far less than a cache's window of
            exact tokens changes nothing to speak of.
        batch_size: contexts read together.
    """
    with without_hint():  # full precision and every cache are read by the same attention
        return {task.name: _score(model, task, make_cache, step, batch_size) for task in tasks}


def _score(
    model: PreTrainedModel, task: TaskSet, make_cache: Callable[[], Cache], step: int, batch_size: int
) -> TaskScore:
    rows = zip(task.contexts.split(batch_size), task.tails.split(batch_size), strict=True)
    found = [_read(model, contexts, tails, make_cache(), step) for contexts, tails in rows]
    likely, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    scored = task.answer_of != NO_ANSWER
    return TaskScore(likely[scored], right[scored], _count_answers(task.answer_of)[scored])


def _read(
    model: PreTrainedModel, contexts: torch.Tensor, tails: torch.Tensor, cache: Cache, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's log-probability in the tails, float32 `[B, T]`, and whether it is the most likely one."""
    tokens = torch.cat([contexts, tails], dim=1).to(model.device)
    likely, right, done = [], [], contexts.shape[1]
    for logits in force_tokens(model, tokens, cache, prefill=done, step=step):
        targets = tokens[:, done : done + logits.shape[1], None]
        done += logits.shape[1]
        likely.append(logits.float().log_softmax(-1).gather(-1, targets)[..., 0])
        right.append(logits.argmax(-1, keepdim=True)[..., 0] == targets[..., 0])
    return torch.cat(likely, dim=1).cpu(), torch.cat(right, dim=1).cpu()


def _count_answers(answer_of: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the answers, `[B, T]`, counted on from context to context."""
    counts = answer_of.amax(1) + 1
    return answer_of + (counts.cumsum(0) - counts)[:, None]
