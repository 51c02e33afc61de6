"""What a run measures, and how."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.needle import DEPTHS, NeedleTask
from kvq.evaluation.quality.text import TokenText
from kvq.registry.requirements import find_versions

AT_ONCE = 8
"""Caches that read side by side: full precision is read once for as many, and all of them are in memory."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The caches to measure, and how to measure them.

    Attributes:
        model: a causal model.
        text: the sequences to read.
        candidates: the caches.
        needles: questions about facts in a long text, or None.
        prefill: tokens of each sequence that are read at once, in full precision; later ones are scored.
        step: tokens of each later forward; 1 as in generation.
        batch_size: sequences read together.
        continuation: tokens of a greedy continuation of each sequence; 0: none.
    """

    model: PreTrainedModel
    text: TokenText
    candidates: Sequence[Candidate]
    needles: NeedleTask | None
    prefill: int = 128
    step: int = 16
    batch_size: int = 4
    continuation: int = 0

    @property
    def batches(self) -> int:
        """How many batches the sequences make."""
        return math.ceil(len(self.text.sequences) / self.batch_size)

    @property
    def steps(self) -> int:
        """Forwards of one cache on one batch, behind those of the prompt."""
        return math.ceil((self.text.sequences.shape[1] - 1 - self.prefill) / self.step)

    @property
    def prompt_length(self) -> int:
        """Tokens of each sequence that a greedy continuation follows: all but the last, at least half of them."""
        length = self.text.sequences.shape[1]
        return max(length - self.continuation, length // 2)

    @property
    def units(self) -> int:
        """Units of progress: the forwards of all caches and of full precision."""
        return sum(self.count_units(index, self.candidates) for index in range(self.batches))

    def count_units(self, index: int, candidates: Sequence[Candidate]) -> int:
        """Return the forwards that some candidates take on one batch, with full precision beside each pass of them."""
        forwards = self.steps + len(self.needle_batches(index)) * len(DEPTHS) + self.continuation
        return forwards * (len(candidates) + math.ceil(len(candidates) / AT_ONCE))

    def sequence_rows(self, index: int) -> slice:
        """Return which sequences a batch has."""
        return slice(index * self.batch_size, (index + 1) * self.batch_size)

    @property
    def needle_count(self) -> int:
        """How many contexts hide facts."""
        return 0 if self.needles is None else len(self.needles.contexts)

    def needle_batches(self, index: int) -> list[slice]:
        """Return which contexts with hidden facts belong to a batch, a fair share, as many together as texts are."""
        first, end = (number * self.needle_count // self.batches for number in (index, index + 1))
        return [slice(start, min(start + self.batch_size, end)) for start in range(first, end, self.batch_size)]

    @property
    def positions(self) -> torch.Tensor:
        """Position of each scored token in its sequence, int64 `[S]`."""
        return torch.arange(len(self.text.scored))[self.prefill :][self.text.scored[self.prefill :]]

    @property
    def digest(self) -> str:
        """A fingerprint of all but the candidates."""
        sizes = self.prefill, self.step, self.batch_size, self.continuation
        parts = [self.text.digest, *sizes, str(self.model.dtype), find_versions()]
        if self.needles:
            parts.append(hashlib.sha256(self.needles.contexts.numpy().tobytes()).hexdigest())
        parts += [f"{name} {weight.detach().double().sum().item()!r}" for name, weight in self.model.named_parameters()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
