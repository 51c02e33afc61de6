"""Facts in a long text, asked for at the end: how sure is the model of the right answer, wherever the fact stood?

A context hides one fact at each depth. They are asked for one after another on the cache that holds the context, each
with its right answer in one forward: a wrong answer does not spoil the questions after it. So the answers are scored,
not written: the log-probability of their tokens, and how many of them are the most likely ones. An answer whose tokens
all are would be written in greedy generation too. What a small model writes freely is noise; its probabilities are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.quality.forcing import read_on
from kvq.evaluation.quality.text import MAX_RECORDS, is_recall_tokenizer

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Positions of the facts, as shares of the context."""
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi")


class NeedleScore(NamedTuple):
    """The answer to one question.

    Attributes:
        depth: position of the fact, one of `DEPTHS`.
        exact: whether every token of the answer is the most likely one.
        right: how many tokens of the key are.
        tokens: how many tokens the key has: those of the answer that have a digit, or all of them where none has.
        log_probability: sum over the tokens of the key, in nats.
    """

    depth: float
    exact: bool
    right: int
    tokens: int
    log_probability: float


@dataclass(frozen=True)
class NeedleTask:
    """Contexts of equal length, with a fact at each of `DEPTHS` and a question about each.

    Attributes:
        contexts: int64 `[N, T]`.
        questions: for each depth the question and its answer, int64 `[N, S]`.
        answers: for each depth the places of the answer in its question.
        keys: for each depth which tokens of the answer are scored, bool `[N, A]`.
    """

    contexts: torch.Tensor
    questions: tuple[torch.Tensor, ...]
    answers: tuple[slice, ...]
    keys: tuple[torch.Tensor, ...]


def build_task(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, *, length: int, per_depth: int, seed: int = 0
) -> NeedleTask:
    """Return a task for a model: records and names for the recall model, else sentences hidden in a text.

    Args:
        tokenizer: the model's tokenizer.
        filler: int64 `[N, L]`, text that the sentences are hidden in.
        length: most tokens of a context with all its questions and answers.
        per_depth: contexts (N), so questions for each depth.
        seed: seed of names and answers.

    Raises:
        EvaluationError: the length leaves no room for a context.
    """
    generator = torch.Generator().manual_seed(seed)
    if is_recall_tokenizer(tokenizer):
        return _draw_recall(length, per_depth, generator)
    return _Hiding(tokenizer, filler, length, generator).build(per_depth)


@torch.inference_mode()
def ask_all(model: PreTrainedModel, task: NeedleTask, rows: slice, cache: Cache) -> Iterator[list[NeedleScore]]:
    """Ask the questions of some contexts on the cache that holds them, and yield the scores after each forward.

    Args:
        model: a causal model.
        task: the questions.
        rows: the contexts in the cache.
        cache: it grows by the questions.
    """
    for depth, questions, place, keys in zip(DEPTHS, task.questions, task.answers, task.keys, strict=True):
        asked = questions[rows].to(model.device)
        logits = read_on(model, asked, cache)[:, place.start - 1 : place.stop - 1]
        yield list(_score(depth, logits, asked[:, place], keys[rows].to(model.device)))


def _score(depth: float, logits: torch.Tensor, answers: torch.Tensor, keys: torch.Tensor) -> Iterator[NeedleScore]:
    """Yield the score of each row from logits `[B, A, V]`, answers and the mask of the key's tokens `[B, A]`."""
    likely = logits.float().log_softmax(-1)
    right = likely.argmax(-1) == answers
    chosen = likely.gather(-1, answers[..., None])[..., 0]
    sums, hits = torch.where(keys, chosen, 0).sum(-1), (right & keys).sum(-1)
    rows = zip(right.all(-1).tolist(), hits.tolist(), keys.sum(-1).tolist(), sums.tolist(), strict=True)
    yield from (NeedleScore(depth, *row) for row in rows)


def _draw_recall(length: int, per_depth: int, generator: torch.Generator) -> NeedleTask:
    records = min(MAX_RECORDS, (length - 1 - len(DEPTHS) * recall.QUESTION_LENGTH) // recall.RECORD_LENGTH)
    if records < 16:
        raise EvaluationError(f"{length} tokens leave no room for a recall task; ask for at least 160")
    batch = recall.sample_recall_batch(per_depth, records, 1, generator=generator)
    lines = batch.context[:, 1:].unflatten(1, (records, recall.RECORD_LENGTH))
    mark = torch.full((per_depth, 1), recall.QUESTION)
    questions = tuple(torch.cat([mark, lines[:, int(depth * records)]], dim=1) for depth in DEPTHS)
    answer = slice(2, 2 + recall.ANSWER_LENGTH)
    keys = torch.ones(per_depth, recall.ANSWER_LENGTH, dtype=torch.bool)
    return NeedleTask(batch.context, questions, (answer,) * len(DEPTHS), (keys,) * len(DEPTHS))


@dataclass(frozen=True)
class _Hiding:
    """Hides sentences about a city each, with a number of five digits, in a text."""

    tokenizer: PreTrainedTokenizerBase
    filler: torch.Tensor
    length: int
    generator: torch.Generator

    def build(self, count: int) -> NeedleTask:
        asks = [self._encode(f"\nThe access code of {city} is") for city in _CITIES]
        size = len(self._encode(" 12345"))
        drawn = [[self._draw_answer(size) for _ in asks] for _ in range(count)]
        end = self._encode(".\n")
        contexts = torch.tensor([self._hide(asks, answers, end) for answers in drawn])
        questions = [torch.tensor([[*ask, *row[place], *end] for row in drawn]) for place, ask in enumerate(asks)]
        keys = [torch.tensor([self._find_key(row[place]) for row in drawn]) for place in range(len(asks))]
        places = tuple(slice(len(ask), len(ask) + size) for ask in asks)
        return NeedleTask(contexts, tuple(questions), places, tuple(keys))

    def _draw_answer(self, size: int) -> list[int]:
        """Return a number of five digits that has `size` tokens."""
        for _ in range(1000):
            answer = self._encode(f" {10000 + self._draw(90000)}")
            if len(answer) == size:
                return answer
        raise EvaluationError("no two numbers of five digits have equally many tokens in this tokenizer; --needles 0")

    def _hide(self, asks: list[list[int]], answers: list[list[int]], end: list[int]) -> list[int]:
        """Return a text with a sentence at each depth, which leaves room for the questions."""
        needles = [[*ask, *answer, *end] for ask, answer in zip(asks, answers, strict=True)]
        room = self.length - 2 * sum(map(len, needles))
        if room < self.length // 4:
            raise EvaluationError(f"{self.length} tokens leave no room for needles; ask for longer sequences")
        text = self.filler[self._draw(len(self.filler)), : min(room, self.filler.shape[1])].tolist()
        cuts = [0, *(max(1, int(depth * len(text))) for depth in DEPTHS)]
        pieces = [text[start:stop] + needle for start, stop, needle in zip(cuts, cuts[1:], needles, strict=False)]
        return [*(token for piece in pieces for token in piece), *text[cuts[-1] :]]

    def _find_key(self, answer: list[int]) -> list[bool]:
        digits = [any(letter.isdigit() for letter in self.tokenizer.decode([token])) for token in answer]
        return digits if any(digits) else [True] * len(answer)

    def _draw(self, top: int) -> int:
        return int(torch.randint(top, (1,), generator=self.generator))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
