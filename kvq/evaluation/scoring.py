"""Scores of a cache on the recall task: answers, agreement with full precision, and what the cache holds.

Questions are asked one after another on the cache that holds the context, one token a step, so that the quantized
history is read and grows as in generation. The right answer is what is fed back: a greedy answer is exact if and only
if every token of it is the most likely one given the right ones before, so that the exact-answer rate is that of
generation, while a wrong answer does not spoil the questions after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention.attend import without_hint
from kvq.cache import KVQ
from kvq.config import KVQCacheConfig
from kvq.evaluation.recall import ANSWER_LENGTH, RecallBatch
from kvq.memory import MemoryReport
from kvq.transformers_seams import pass_cache

NAME_POSITION = 1
"""Place of the name in a question: after it the model answers."""


@dataclass(frozen=True)
class RecallScore:
    """How one cache did.

    Attributes:
        predictions: most likely tokens, int64 `[B, Q, ANSWER_LENGTH + 1]`: the answer and the full stop.
        exact_rate: share of the questions whose whole answer is right.
        agreement: share of the predictions that equal those in full precision; 1.0 for full precision itself.
        memory: what the cache held at the end, or None for a cache that is not ours.
    """

    predictions: torch.Tensor
    exact_rate: float
    agreement: float
    memory: MemoryReport | None = None


@torch.inference_mode()
def score_recall(
    model: PreTrainedModel, batch: RecallBatch, cache: Cache, reference: RecallScore | None = None
) -> RecallScore:
    """Ask all questions of a batch on one cache.

    Args:
        model: a model of the recall task.
        batch: contexts and questions.
        cache: an empty cache.
        reference: the score of full precision on the same batch, for the agreement.
    """
    with without_hint():  # full precision and every cache are read by the same attention
        model(batch.context, logits_to_keep=1, **pass_cache(model, cache))
        asked = [_ask(model, question, cache) for question in batch.questions.unbind(1)]
    predictions = torch.stack(asked, dim=1)
    exact = (predictions[..., :ANSWER_LENGTH] == batch.answers).all(-1).float().mean().item()
    agreement = 1.0 if reference is None else (predictions == reference.predictions).float().mean().item()
    return RecallScore(predictions, exact, agreement, cache.memory() if isinstance(cache, KVQ) else None)


def score_config(
    model: PreTrainedModel, batch: RecallBatch, config: KVQCacheConfig, reference: RecallScore | None = None
) -> RecallScore:
    """Ask all questions of a batch on a fresh `KVQ`; see `score_recall`."""
    return score_recall(model, batch, KVQ(config, model=model), reference)


def _ask(model: PreTrainedModel, question: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Feed one question `[B, QUESTION_LENGTH]` token by token and return what the model says after the name."""
    said = list(_decode(model, question, cache))
    return torch.stack(said[NAME_POSITION : NAME_POSITION + ANSWER_LENGTH + 1], dim=1)


def _decode(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> Iterator[torch.Tensor]:
    for token in tokens.split(1, dim=1):
        yield model(token, **pass_cache(model, cache)).logits[:, -1].argmax(-1)
