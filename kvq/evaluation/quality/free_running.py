"""Greedy continuations: where a cache first says something else than full precision, and how far it drifts then.

A text that is forced on a cache tells of one token at a time. In generation a wrong token is read again: what follows
is another text, however small the error was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.evaluation.quality.forcing import read_on


@dataclass(frozen=True)
class Divergence:
    """How one continuation differs from that in full precision.

    Attributes:
        first_difference: tokens that are equal before the first one that differs; inf where none does.
        drift: normalized Levenshtein distance of the rests from there on, from 0 to 1; 0 where nothing differs.
        said: tokens of the continuation, up to its end.
        expected: tokens of that in full precision.
    """

    first_difference: float
    drift: float
    said: tuple[int, ...] = field(default=(), compare=False, repr=False)
    expected: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def between(cls, said: Sequence[int], expected: Sequence[int]) -> Divergence:
        """Compare two continuations, each up to its end of text."""
        texts = tuple(said), tuple(expected)
        if texts[0] == texts[1]:
            return cls(math.inf, 0.0, *texts)
        equal = 0
        while equal < min(len(said), len(expected)) and said[equal] == expected[equal]:
            equal += 1
        rests = said[equal:], expected[equal:]
        return cls(float(equal), levenshtein(*rests) / max(map(len, rests)), *texts)


def levenshtein(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the fewest insertions, deletions and replacements of tokens that make one sequence the other.

    Source: Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals", 1966.
    """
    columns = np.arange(len(other) + 1)
    row = columns
    for token in one:
        replaced = row[:-1] + (np.asarray(other) != token)
        row = np.concatenate([row[:1] + 1, np.minimum(row[1:] + 1, replaced)])
        row = np.minimum.accumulate(row - columns) + columns  # insertions, from the left to the right
    return int(row[-1])


def write_on(model: PreTrainedModel, cache: Cache, logits: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Continue greedily and yield the tokens one by one, int64 `[B, 1]`.

    Args:
        model: a causal model.
        cache: a cache that holds the prompt.
        logits: predictions after the prompt, float `[B, 1, V]`.
        count: tokens to write; the last one is not read.
    """
    token = logits.argmax(-1)
    yield token
    for _ in range(count - 1):
        token = read_on(model, token, cache)[:, -1:].argmax(-1)
        yield token


def find_ends(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end a text of the model; none where it names none."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([named] if isinstance(named, int) else named or [])


def cut_at_end(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Return the tokens up to the first that ends a text, that one included."""
    last = next((place for place, token in enumerate(row) if token in ends), len(row))
    return list(row[: last + 1])
