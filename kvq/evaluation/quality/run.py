"""Measure caches on a text: batch by batch, each against full precision on the same tokens.

A run may be stopped at any time. Finished parts lie in a folder, a file for each cache and batch, and the next run with
the same model, text and settings resumes after them. Several processes share the batches between them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention.hint import without_hint
from kvq.cache.kvq import KVQ
from kvq.evaluation.quality.candidates import (
    Candidate,
    count_full_precision_bytes,
    count_held_bytes,
    history_errors,
)
from kvq.evaluation.quality.forcing import force_tokens
from kvq.evaluation.quality.metrics import TokenScores
from kvq.evaluation.quality.needle import NeedleTask, answer_exactly
from kvq.evaluation.quality.processes import Processes
from kvq.evaluation.quality.record import BatchResult, NeedleAnswer, QualityRecord, summarize
from kvq.evaluation.quality.text import TokenText
from kvq.registry.requirements import find_versions

DISTANCE_BINS = 8


@dataclass(frozen=True)
class EvaluationPlan:
    """The caches to measure, and how to measure them.

    Attributes:
        model: a causal model.
        text: the sequences to read.
        candidates: the caches.
        needles: questions about a fact in a long text, or None.
        prefill: tokens of each sequence that are read at once; later ones are scored.
        step: tokens of each later forward; 1 as in generation.
        batch_size: sequences read together.
    """

    model: PreTrainedModel
    text: TokenText
    candidates: Sequence[Candidate]
    needles: NeedleTask | None
    prefill: int = 128
    step: int = 1
    batch_size: int = 8

    @property
    def batches(self) -> int:
        """How many batches the sequences make."""
        return math.ceil(len(self.text.sequences) / self.batch_size)

    @property
    def units(self) -> int:
        """Units of progress: one cache on one batch is one, full precision among them."""
        return self.batches * (len(self.candidates) + 1)

    @property
    def digest(self) -> str:
        """A fingerprint of all but the candidates."""
        parts = [self.text.digest, self.prefill, self.step, self.batch_size, str(self.model.dtype), find_versions()]
        if self.needles:
            parts.append(hashlib.sha256(self.needles.prompts.numpy().tobytes()).hexdigest())
        parts += [f"{name} {weight.detach().double().sum().item()!r}" for name, weight in self.model.named_parameters()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def evaluate(
    plan: EvaluationPlan,
    *,
    parts: Path | None = None,
    processes: Processes | None = None,
    on_progress: Callable[[str], None] = lambda label: None,  # noqa: ARG005
    on_record: Callable[[QualityRecord], None] = lambda record: None,  # noqa: ARG005
) -> list[QualityRecord]:
    """Measure all candidates of a plan.

    Args:
        plan: the caches and the text.
        parts: folder for finished parts, or None; needed to resume after an interruption.
        processes: the processes that share the batches; this one alone unless given.
        on_progress: called after each cache and batch with the label of the next one.
        on_record: called with each record as soon as it is complete: during the last batch if this process is alone,
            else at the end.

    Returns:
        A record for each candidate, in their order; the same in every process.
    """
    processes = processes or Processes()
    finished = _Parts(parts, plan)
    failures: dict[str, str] = {}
    own: list[tuple[str, int, Any]] = []
    records: dict[str, QualityRecord] = {}

    def complete(candidate: Candidate, entries: Sequence[tuple[str, int, Any]]) -> None:
        records[candidate.label] = _summarize(plan, candidate, entries, failures)
        on_record(records[candidate.label])

    with without_hint():  # full precision and every cache are read by the same attention
        for index in range(processes.index, plan.batches, processes.count):
            for candidate, result in _measure_batch(plan, index, finished, failures, on_progress):
                own.append((candidate.label, index, result))
                if processes.count == 1 and index == plan.batches - 1:
                    complete(candidate, own)
    gathered = sorted(processes.gather(own), key=lambda entry: entry[1])
    failures = dict(processes.gather(list(failures.items())))
    for candidate in plan.candidates:
        if candidate.label not in records:
            complete(candidate, gathered)
    return [records[candidate.label] for candidate in plan.candidates]


def _summarize(
    plan: EvaluationPlan, candidate: Candidate, gathered: Sequence[tuple[str, int, Any]], failures: Mapping[str, str]
) -> QualityRecord:
    if candidate.label in failures:
        return QualityRecord(candidate.label, candidate.settings, candidate.is_peer, failure=failures[candidate.label])
    results = [result for label, _, result in gathered if label == candidate.label]
    needles = [answer for _, answers in results for answer in answers]
    return summarize(candidate, [batch for batch, _ in results], needles, 8 * plan.model.dtype.itemsize)


def _measure_batch(
    plan: EvaluationPlan,
    index: int,
    finished: _Parts,
    failures: dict[str, str],
    on_progress: Callable[[str], None],
) -> Iterator[tuple[Candidate, Any]]:
    """Yield the result of each candidate on one batch; full precision runs only if a result is missing."""
    reference: _Reference | None = None
    for candidate in plan.candidates:
        on_progress(candidate.label)
        result = finished.find(candidate, index)
        if result is None and candidate.label not in failures:
            reference = reference or _Reference.run(plan, index)
            try:
                result = _measure(plan, candidate, index, reference)
            except Exception as error:
                if not candidate.is_peer:
                    raise
                # A peer that this version of transformers lacks, or that cannot serve the model, is reported as such.
                failures[candidate.label] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            finished.keep(candidate, index, result)
        if result is not None:
            yield candidate, result
    on_progress("full precision")


@dataclass(frozen=True)
class _Reference:
    """Full precision on one batch.

    Attributes:
        tokens: int64 `[B, L]`, on the model's device.
        logits: for each step, in the model's dtype.
        cache: the cache after the last token.
        answers: depth and success of each question of this batch.
    """

    tokens: torch.Tensor
    logits: list[torch.Tensor]
    cache: Cache
    answers: list[tuple[float, bool]]

    @classmethod
    def run(cls, plan: EvaluationPlan, index: int) -> _Reference:
        rows = slice(index * plan.batch_size, (index + 1) * plan.batch_size)
        tokens = plan.text.sequences[rows].to(plan.model.device)

        def build() -> Cache:
            empty: Cache = DynamicCache(config=plan.model.config)
            return empty

        cache = build()
        logits = list(force_tokens(plan.model, tokens, cache, prefill=plan.prefill, step=plan.step))
        return cls(tokens, logits, cache, _answer_needles(plan, build, index))


def _measure(
    plan: EvaluationPlan, candidate: Candidate, index: int, reference: _Reference
) -> tuple[BatchResult, list[NeedleAnswer]]:
    cache = candidate.build(plan.model)
    steps = force_tokens(plan.model, reference.tokens, cache, prefill=plan.prefill, step=plan.step)
    targets = reference.tokens[:, plan.prefill :]
    scores, done = [], 0
    for logits, expected in zip(steps, reference.logits, strict=True):
        count = logits.shape[1]
        scores.append(TokenScores.compare(logits, expected, targets[:, done : done + count]))
        done += count
    memory = cache.memory() if isinstance(cache, KVQ) else None
    batch = BatchResult(
        scores=TokenScores.concatenate(scores, dim=1).select(plan.text.scored[plan.prefill :]),
        held_bytes=count_held_bytes(cache),
        full_precision_bytes=count_full_precision_bytes(cache, reference.cache),
        errors_by_distance=history_errors(cache, reference.cache, DISTANCE_BINS),
        bits=(memory.effective_bits_key, memory.effective_bits_value) if memory else (None, None),
    )
    answers = _answer_needles(plan, lambda: candidate.build(plan.model), index)
    compared = zip(answers, reference.answers, strict=True)
    return batch, [(depth, right, expected) for (depth, right), (_, expected) in compared]


def _answer_needles(plan: EvaluationPlan, build: Callable[[], Cache], index: int) -> list[tuple[float, bool]]:
    """Answer this batch's share of the questions."""
    if plan.needles is None:
        return []
    share = math.ceil(len(plan.needles.prompts) / plan.batches)
    rows = slice(index * share, (index + 1) * share)
    return list(answer_exactly(plan.model, plan.needles, build, batch_size=plan.batch_size, rows=rows))


class _Parts:
    """Results of single batches on disk; it keeps nothing without a folder."""

    def __init__(self, folder: Path | None, plan: EvaluationPlan) -> None:
        self.folder = folder
        self.digest = plan.digest if folder else ""

    def find(self, candidate: Candidate, index: int) -> Any:
        """Return the result of an earlier run, or None."""
        path = self._path(candidate, index)
        if path is None or not path.is_file():
            return None
        kept = torch.load(path, weights_only=True)
        batch = BatchResult(TokenScores(**kept["scores"]), bits=tuple(kept["bits"]), **kept["batch"])
        return batch, [tuple(answer) for answer in kept["needles"]]

    def keep(self, candidate: Candidate, index: int, result: tuple[BatchResult, list[NeedleAnswer]]) -> None:
        """Write a result atomically: its file is whole, or there is none."""
        path = self._path(candidate, index)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        batch, needles = result
        facts = {name: getattr(batch, name) for name in ("held_bytes", "full_precision_bytes", "errors_by_distance")}
        kept = {"batch": facts, "scores": asdict(batch.scores), "bits": list(batch.bits), "needles": needles}
        unfinished = path.with_suffix(".unfinished")
        torch.save(kept, unfinished)
        unfinished.replace(path)

    def _path(self, candidate: Candidate, index: int) -> Path | None:
        return self.folder / f"{self.digest}-{candidate.digest}-{index}.pt" if self.folder else None
