"""Scores of a cache on the recall task: answers, agreement with full precision, and bytes held.

Questions are asked one after another on the cache that holds the context, each with its right answer in one forward:
the quantized history is read and grows as in generation. A greedy answer is exact if and only if every token of it is
the most likely one given the right ones before, so the exact-answer rate is that of generation, while a wrong answer
does not spoil the questions after it. That the tokens of one forward see each other exactly is no advantage as long as
they are fewer than the `residual_length` newest ones, which are always exact; only the tokens that become old enough
during a forward are quantized a few tokens later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention.hint import without_hint
from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.evaluation.recall import ANSWER_LENGTH, RecallBatch
from kvq.layers.held_bytes import report_memory
from kvq.layers.memory_report import MemoryReport
from kvq.transformers_seams.private_names import pass_cache

NAME_POSITION = 1
"""Position of the name in a question: the model answers after it."""


@dataclass(frozen=True)
class RecallScore:
    """The score of one cache.

    Attributes:
        predictions: most likely tokens, int64 `[B, Q, ANSWER_LENGTH + 1]`: the answer and the full stop.
        exact: whether the whole answer is right, bool `[B, Q]`.
        agreement: share of the predictions that equal those in full precision; 1.0 for full precision itself.
        held_bytes: bytes that the cache held at the end.
        memory: the cache's memory report, or None for a cache that is not ours.
    """

    predictions: torch.Tensor
    exact: torch.Tensor
    agreement: float
    held_bytes: int
    memory: MemoryReport | None = None

    @property
    def exact_rate(self) -> float:
        """Share of the questions whose whole answer is right."""
        return self.exact.float().mean().item()

    @property
    def exact_by_context(self) -> torch.Tensor:
        """The same share for each context, float32 `[B]`."""
        return self.exact.float().mean(1)


@torch.inference_mode()
def score_recall(
    model: PreTrainedModel,
    batch: RecallBatch,
    cache: Cache,
    reference: RecallScore | None = None,
    *,
    at_once: int = 1,
) -> RecallScore:
    """Ask all questions of a batch on one cache.

    Args:
        model: a model of the recall task.
        batch: contexts and questions.
        cache: an empty cache.
        reference: full precision's score on the same batch, for the agreement.
        at_once: questions in one forward.
    """
    with without_hint():  # full precision and every cache are read by the same attention
        model(batch.context, logits_to_keep=1, **pass_cache(model, cache))
        said = [_ask(model, some, cache) for some in batch.questions.split(at_once, dim=1)]
    predictions = torch.cat(said, dim=1)
    exact = (predictions[..., :ANSWER_LENGTH] == batch.answers).all(-1)
    agreement = 1.0 if reference is None else (predictions == reference.predictions).float().mean().item()
    own = isinstance(cache, KVQ)
    memory = cache.memory() if own else report_memory(cache.layers)
    return RecallScore(predictions, exact, agreement, memory.total_bytes, memory if own else None)


def score_config(
    model: PreTrainedModel,
    batch: RecallBatch,
    config: KVQCacheConfig,
    reference: RecallScore | None = None,
    *,
    at_once: int = 1,
) -> RecallScore:
    """Ask all questions of a batch on a fresh `KVQ`; see `score_recall`."""
    return score_recall(model, batch, KVQ(config, model=model), reference, at_once=at_once)


def _ask(model: PreTrainedModel, questions: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Feed questions `[B, Q, QUESTION_LENGTH]` with their answers and return the model's tokens after each name."""
    said: torch.Tensor = model(questions.flatten(1), **pass_cache(model, cache)).logits.argmax(-1)
    return said.view(questions.shape)[..., NAME_POSITION : NAME_POSITION + ANSWER_LENGTH + 1]
