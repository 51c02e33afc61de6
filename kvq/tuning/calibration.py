"""The calibration text: full precision has read it, and any settings can be measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvq.errors import EvaluationError
from kvq.evaluation.quality.processes import Processes
from kvq.tuning.kept_probes import KeptProbes
from kvq.tuning.probing import Probes
from kvq.tuning.side_setting import Assignment
from kvq.tuning.tuning_plan import TuningPlan
from kvq.watcher import Watcher

AT_ONCE = 7
"""Assignments of one forward: each takes the memory of a cache in full precision."""

READING = "reading the calibration text in full precision"


class CalibrationText:
    """Measures assignments on a text, and keeps what it has measured.

    Args:
        plan: the model, the text, and how it is read.
        kept: what earlier runs have measured; it grows.
        watcher: is told of every assignment that is done.
        processes: the processes that share the measurements, each of which reads the text.
    """

    def __init__(self, plan: TuningPlan, kept: KeptProbes, watcher: Watcher, processes: Processes) -> None:
        self._kept = kept
        self._processes = processes
        self._watcher = watcher
        rows = plan.text.sequences.split(plan.batch_size)
        watcher.begin(READING, len(rows), "batches")
        self._batches: list[Probes] = []
        for some in rows:
            text = replace(plan.text, sequences=some)
            self._batches.append(Probes(plan.model, text, plan.base, prefill=plan.prefill, step=plan.step))
            watcher.advance(READING)
        self.skips = all(batch.skips for batch in self._batches)

    def measure(self, assignments: Sequence[Assignment], label: str) -> list[torch.Tensor]:
        """Return the divergence of each predicted token under each assignment, float32 `[N, S]`, in nats.

        Args:
            assignments: what to quantize; neighbours should begin at about the same layer.
            label: names the task for the watcher.
        """
        found = [self._kept.find(one) for one in assignments]
        # Every process must share out the same ones, and none may write before all have looked.
        missing = sorted({*self._processes.gather([place for place, one in enumerate(found) if one is None])})
        self._watcher.advance(label, len(found) - len(missing))
        runs = _split(missing, AT_ONCE, self._processes.count)
        measured = [
            entry
            for places in runs[self._processes.index :: self._processes.count]
            for entry in self._measure_run(places, assignments, label)
        ]
        for place, divergences in self._processes.gather(measured):
            found[place] = divergences
        self._watcher.advance(label, len(missing) - len(measured))
        return [one for one in found if one is not None]

    def _measure_run(
        self, places: Sequence[int], assignments: Sequence[Assignment], label: str
    ) -> list[tuple[int, torch.Tensor]]:
        """Measure and keep the assignments at some places, in one batch."""
        found = list(zip(places, self._measure([assignments[one] for one in places]), strict=True))
        for place, divergences in found:
            self._kept.keep(assignments[place], divergences)
        self._watcher.advance(label, len(places))
        return found

    def _measure(self, assignments: Sequence[Assignment]) -> list[torch.Tensor]:
        parts = zip(*(batch.measure(assignments) for batch in self._batches), strict=True)
        return [torch.cat(rows) for rows in parts]


def check_quantized(divergences: Sequence[float], plan: TuningPlan) -> None:
    """Refuse a text so short that no quantized state was ever read.

    Raises:
        EvaluationError: every divergence is zero.
    """
    if not any(divergences):
        length = plan.text.sequences.shape[1]
        raise EvaluationError(
            f"nothing was quantized in {length} tokens: the window has {plan.base.residual_length} and a block of the "
            "codes must be full; ask for longer sequences, --length"
        )


def _split(places: Sequence[int], most: int, processes: int) -> list[Sequence[int]]:
    """Return runs of about equal length, at most so long, as many for each process."""
    count = processes * max(1, -(-len(places) // (most * processes)))
    size = max(1, -(-len(places) // count))
    return [places[start : start + size] for start in range(0, len(places), size)]
