"""One fact in a long text, asked for at the end: is the answer still exact, wherever the fact stood?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.quality.forcing import force_tokens
from kvq.evaluation.quality.text import MAX_RECORDS, is_recall_tokenizer

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Positions of the facts, as shares of the context."""
NO_TOKEN = -1
QUESTION_STEPS = 8
"""Last tokens of the prompt that are read one by one, behind the context."""
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Lima", "Cairo")


@dataclass(frozen=True)
class NeedleTask:
    """Prompts of equal length, each with one question.

    Attributes:
        prompts: int64 `[N, T]`, context and question.
        answers: int64 `[N, A]`, shorter ones filled up with `NO_TOKEN`.
        depths: the position of the fact in each prompt, one of `DEPTHS`.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    depths: tuple[float, ...]


def build_task(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, *, length: int, per_depth: int, seed: int = 0
) -> NeedleTask:
    """Return a task for a model: records and names for the recall model, else sentences hidden in a text.

    Args:
        tokenizer: the model's tokenizer.
        filler: int64 `[N, L]`, text that the sentences are hidden in.
        length: most tokens of a prompt and its answer.
        per_depth: questions for each depth.
        seed: seed of names and answers.

    Raises:
        EvaluationError: the length leaves no room for a context.
    """
    generator = torch.Generator().manual_seed(seed)
    if is_recall_tokenizer(tokenizer):
        return _draw_recall(length, per_depth, generator)
    cases = [_hide(tokenizer, filler, length, depth, generator) for depth in DEPTHS for _ in range(per_depth)]
    prompts, answers = zip(*cases, strict=True)
    depths = tuple(depth for depth in DEPTHS for _ in range(per_depth))
    return NeedleTask(_stack(prompts), _fill_up(answers), depths)


def answer_exactly(
    model: PreTrainedModel, task: NeedleTask, build: Callable[[], Cache], *, batch_size: int, rows: slice
) -> Iterator[tuple[float, bool]]:
    """Yield depth and whether the whole greedy answer is right, for each prompt of `rows`.

    The question is read token by token behind the context, from the cache alone.
    """
    chosen = range(*rows.indices(len(task.prompts)))
    for start in range(0, len(chosen), batch_size):
        places = list(chosen[start : start + batch_size])
        prompts, answers = task.prompts[places], task.answers[places]
        tokens = torch.cat([prompts, answers.clamp_min(0)], dim=1).to(model.device)
        logits = force_tokens(model, tokens, build(), prefill=prompts.shape[1] - QUESTION_STEPS, step=1)
        said = torch.cat([step.argmax(-1).cpu() for step in logits], dim=1)[:, QUESTION_STEPS:]
        right = ((said == answers) | (answers == NO_TOKEN)).all(-1).tolist()
        yield from zip((task.depths[place] for place in places), right, strict=True)


def _draw_recall(length: int, per_depth: int, generator: torch.Generator) -> NeedleTask:
    records = min(MAX_RECORDS, (length - 1 - recall.QUESTION_LENGTH) // recall.RECORD_LENGTH)
    if records < 16:
        raise EvaluationError(f"{length} tokens leave no room for a recall task; ask for at least 128")
    count = len(DEPTHS) * per_depth
    batch = recall.sample_recall_batch(count, records, 1, generator=generator)
    depths = tuple(depth for depth in DEPTHS for _ in range(per_depth))
    lines = batch.context[:, 1:].unflatten(1, (records, recall.RECORD_LENGTH))
    facts = torch.stack([row[int(depth * records)] for row, depth in zip(lines, depths, strict=True)])
    mark = torch.full((count, 1), recall.QUESTION)
    return NeedleTask(
        torch.cat([batch.context, mark, facts[:, :1]], dim=1), facts[:, 1 : 1 + recall.ANSWER_LENGTH], depths
    )


def _hide(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, length: int, depth: float, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return a prompt with a sentence at `depth` and the tokens that answer it."""
    place, row, number = (int(torch.randint(top, (1,), generator=generator)) for top in (8, len(filler), 90000))
    question = f"The access code of {_CITIES[place]} is"
    ask, answer = (_encode(tokenizer, text) for text in (f"\n{question}", f" {10000 + number}"))
    needle = [*ask, *answer, *_encode(tokenizer, ".\n")]
    room = length - len(needle) - len(ask) - len(answer)
    if room < length // 2:
        raise EvaluationError(f"{length} tokens leave no room for a needle; ask for longer sequences")
    room = min(room, filler.shape[1])
    text = filler[row, :room].tolist()
    where = max(1, int(depth * room))
    return [*text[:where], *needle, *text[where:], *ask], answer


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _stack(rows: tuple[list[int], ...]) -> torch.Tensor:
    """Return rows as `[N, T]`, cut at the front to the length of the shortest; the first token stays."""
    shortest = min(map(len, rows))
    return torch.tensor([[row[0], *row[len(row) - shortest + 1 :]] for row in rows])


def _fill_up(rows: tuple[list[int], ...]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[NO_TOKEN] * (longest - len(row))] for row in rows])
