"""Measure caches on a text: batch by batch, each against full precision on the same tokens.

A run may be stopped at any time. Finished parts lie in a folder, a file for each cache and batch, and the next run with
the same model, text and settings resumes after them. Several processes share the batches between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvq.attention.hint import without_hint
from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.parts import Parts
from kvq.evaluation.quality.plan import AT_ONCE, EvaluationPlan
from kvq.evaluation.quality.processes import Processes
from kvq.evaluation.quality.record import BatchResult, QualityRecord, summarize
from kvq.evaluation.quality.side_by_side import OnProgress, SideBySide

__all__ = ["Budget", "EvaluationPlan", "evaluate"]
_Entry = tuple[str, int, BatchResult]


class Budget:
    """The time that a run may take: no batch begins that would not end in it, as far as the longest so far tells.

    The first batch always begins.

    Args:
        seconds: the time; None: as long as it takes.
        clock: returns seconds that never go back.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._started = self._begun = clock()
        self._longest = 0.0

    def allows_another(self) -> bool:
        """Note the end of the last batch, and return whether another one may begin."""
        now = self._clock()
        self._longest, self._begun = max(self._longest, now - self._begun), now
        return self._seconds is None or now - self._started + self._longest <= self._seconds


def evaluate(
    plan: EvaluationPlan,
    *,
    parts: Path | None = None,
    processes: Processes | None = None,
    budget: Budget | None = None,
    on_progress: OnProgress = lambda task, forwards: None,  # noqa: ARG005
    on_record: Callable[[QualityRecord], None] = lambda record: None,  # noqa: ARG005
) -> list[QualityRecord]:
    """Measure all candidates of a plan.

    Args:
        plan: the caches and the text.
        parts: folder for finished parts, or None; needed to resume after an interruption.
        processes: the processes that share the batches; this one alone unless given.
        budget: the time; where it ends, the last batches are left out, for every cache: `kl_by_sequence` of a record
            has one number for each sequence that was read.
        on_progress: called after each forward; see `OnProgress`.
        on_record: called with each record at the end.

    Returns:
        A record for each candidate, in their order; the same in every process.
    """
    processes, budget = processes or Processes(), budget or Budget()
    finished = Parts(parts, plan.digest if parts else "")
    failures: dict[str, str] = {}
    own: list[_Entry] = []
    with without_hint():  # full precision and every cache are read by the same attention
        for turn, index in enumerate(range(processes.index, plan.batches, processes.count)):
            if turn and not budget.allows_another():
                break
            own += _measure_batch(plan, index, finished, failures, on_progress)
    gathered = sorted(processes.gather(own), key=lambda entry: entry[1])
    failures = dict(processes.gather(list(failures.items())))
    records = [_summarize(plan, candidate, gathered, failures) for candidate in plan.candidates]
    for record in records:
        on_record(record)
    return records


def _summarize(
    plan: EvaluationPlan, candidate: Candidate, gathered: Sequence[_Entry], failures: Mapping[str, str]
) -> QualityRecord:
    if candidate.label in failures:
        return QualityRecord(candidate.label, candidate.settings, candidate.is_peer, failure=failures[candidate.label])
    results = [result for label, _, result in gathered if label == candidate.label]
    return summarize(candidate, results, plan.positions, 8 * plan.model.dtype.itemsize)


def _measure_batch(
    plan: EvaluationPlan, index: int, finished: Parts, failures: dict[str, str], on_progress: OnProgress
) -> Iterator[_Entry]:
    """Yield the result of each candidate on one batch; what is finished already is not measured again."""
    missing = []
    for candidate in plan.candidates:
        result = finished.find(candidate, index)
        if result is not None:
            yield candidate.label, index, result
        elif candidate.label not in failures:
            missing.append(candidate)
    on_progress("full precision", plan.count_units(index, plan.candidates) - plan.count_units(index, missing))
    for start in range(0, len(missing), AT_ONCE):
        for candidate, result in SideBySide(
            plan, index, missing[start : start + AT_ONCE], failures, on_progress
        ).measure():
            finished.keep(candidate, index, result)
            yield candidate.label, index, result
