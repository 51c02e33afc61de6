"""Log-likelihoods of continuations, read from the cache as in generation.

One forward over context and continuation would never read the stored history: the states of the current forward are
exact. So the context but for its last token is read at once, as `generate` reads a prompt; then every token whose
successor is scored is read in steps of decode size, after a history that is stored already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.transformers_seams.private_names import pass_cache

BuildCache = Callable[[Sequence[int]], Cache]
"""Makes an empty cache, given the tokens of left padding in each row."""


@dataclass(frozen=True)
class ContinuationScore:
    """The score of a continuation.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        is_greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Reading:
    """The tokens that one row of a batch reads, and those scored after it.

    Attributes:
        prompt: tokens read at once, not scored.
        steps: tokens read in steps; the one after each is scored.
        endings: last tokens of the continuations, by the place of the request; `steps` has the tokens they share.
    """

    prompt: tuple[int, ...]
    steps: tuple[int, ...]
    endings: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.steps)


def plan_readings(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Reading]:
    """Return the readings that score each continuation after its context, longest first.

    Requests that differ only in the very last token, such as the choices "A" to "D", are read once.

    Args:
        requests: token ids of context and continuation, each at least one.
        max_length: most tokens that the model takes; the beginning of a longer text is left out.
    """
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Reading] = {}
    for place, (context, continuation) in enumerate(requests):
        read = (*context, *continuation)[-(max_length + 1) : -1]
        split = max(len(read) - len(continuation), 0)
        key = read[:split], read[split:]
        found.setdefault(key, Reading(*key)).endings[place] = continuation[-1]
    return sorted(found.values(), key=len, reverse=True)


@torch.inference_mode()
def score_readings(
    model: PreTrainedModel,
    readings: Sequence[Reading],
    build_cache: BuildCache,
    *,
    step: int = 1,
    softmax_dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, ContinuationScore]]:
    """Read a batch and yield place and score of each request.

    Prompts are padded on the left: all rows begin their steps together. Steps are padded on the right, where tokens
    after a row's end change nothing before it. As under `generate`, padding on the left shifts where a row's groups
    begin: its quantized states, and its scores, are not bit for bit those of the row alone.

    Args:
        model: a causal model.
        readings: the rows.
        build_cache: makes the cache that the tokens are read into.
        step: tokens of each forward after the prompts; they see each other exactly: only 1 reads as generation does.
        softmax_dtype: dtype of the log-probabilities; the logits' dtype unless given.
    """
    batch = _Batch.pad(readings, model.device)
    cache = build_cache(batch.padding)
    per_token, greedy = [], []
    for logits, targets in batch.read(model, cache, step):
        log_probabilities = logits.log_softmax(-1, dtype=softmax_dtype)
        per_token.append(log_probabilities.gather(-1, targets))
        greedy.append(log_probabilities.argmax(-1, keepdim=True) == targets)
    yield from batch.sum_up(torch.cat(per_token, dim=1), torch.cat(greedy, dim=1))


@dataclass(frozen=True)
class _Batch:
    """Padded tokens: prompts int64 `[B, P]`, steps `[B, S]`, targets `[B, S, A]`, mask of real tokens `[B, P + S]`."""

    readings: Sequence[Reading]
    prompts: torch.Tensor
    steps: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def pad(cls, readings: Sequence[Reading], device: torch.device) -> _Batch:
        """Pad to the longest prompt, the longest steps and the most endings, with token 0, which nothing sees."""
        before = max(len(reading.prompt) for reading in readings)
        after = max(len(reading.steps) for reading in readings)
        answers = max(len(reading.endings) for reading in readings)
        shape = len(readings), before + after
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        targets = torch.zeros(len(readings), after, answers, dtype=torch.long)
        for row, reading in enumerate(readings):
            real = slice(before - len(reading.prompt), before + len(reading.steps))
            tokens[row, real] = torch.tensor(reading.prompt + reading.steps)
            mask[row, real] = 1
            for answer, ending in enumerate(reading.endings.values()):
                targets[row, : len(reading.steps), answer] = torch.tensor((*reading.steps[1:], ending))
        prompts, steps = tokens.to(device).split([before, after], dim=1)
        return cls(readings, prompts, steps, targets.to(device), mask.to(device))

    @property
    def padding(self) -> list[int]:
        """Tokens of left padding in each row."""
        return [self.prompts.shape[1] - len(reading.prompt) for reading in self.readings]

    def read(self, model: PreTrainedModel, cache: Cache, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Feed all tokens and yield logits `[B, s, V]` of the steps with their targets `[B, s, A]`."""
        forward = _Forward(model, cache, self.mask)
        if self.prompts.shape[1]:
            forward(self.prompts, logits_to_keep=1)
        for tokens, targets in zip(self.steps.split(step, dim=1), self.targets.split(step, dim=1), strict=True):
            yield forward(tokens), targets

    def sum_up(self, per_token: torch.Tensor, greedy: torch.Tensor) -> Iterator[tuple[int, ContinuationScore]]:
        """Yield place and score of each request from those of its tokens, `[B, S, A]`; padding does not count."""
        for reading, likely, equal in zip(self.readings, per_token.cpu(), greedy.cpu(), strict=True):
            count = len(reading.steps)
            sums, all_equal = likely[:count].sum(0), equal[:count].all(0)
            for answer, place in enumerate(reading.endings):
                yield place, ContinuationScore(float(sums[answer]), bool(all_equal[answer]))


class _Forward:
    """Consecutive forwards of a model on one cache.

    Args:
        model: a causal model.
        cache: its cache, empty at first.
        mask: int64 `[B, T]` over all tokens that will be read, 1 at the real ones.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: torch.Tensor) -> None:
        self._model = model
        self._cache = cache
        self._mask = mask
        self._positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self._accepted = inspect.signature(model.forward).parameters.keys()
        self._read = 0

    def __call__(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return logits `[B, t, V]` of the next tokens `[B, t]`; options unknown to the model are left out."""
        start, self._read = self._read, self._read + tokens.shape[1]
        options["position_ids"] = self._positions[:, start : self._read]
        known = {name: value for name, value in options.items() if name in self._accepted}
        mask = self._mask[:, : self._read]
        output = self._model(
            tokens, attention_mask=mask, use_cache=True, **pass_cache(self._model, self._cache), **known
        )
        logits: torch.Tensor = output.logits
        return logits
