"""Measure contenders round-robin: in every round each takes one step, in an order that rotates from round to round.

A disturbance of the machine then affects all of them, and ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvq.benchmark.clock import time_call, transient_bytes
from kvq.benchmark.contenders import Contender
from kvq.benchmark.flush import flush_interval, steps_before_flush
from kvq.benchmark.machine import find_available_bytes
from kvq.benchmark.measured import Measured
from kvq.benchmark.setting import Setting
from kvq.benchmark.trial import LayerTrial, Trial
from kvq.errors import KVQError
from kvq.evaluation.quality.candidates import count_held_bytes

OnProgress = Callable[[str, int], None]
MakeTrial = Callable[[Contender, Setting, int], Trial]

MEMORY_STEPS = 3
"""Steps needed to measure memory and the error."""
MEMORY_SHARE = 0.8
"""The share of the available memory that a run may take."""
FULL_PRECISION_COPIES = 6
"""Histories in full precision that exist at once at the peak: three baselines, the source, and two to concatenate."""
QUANTIZED_SHARE = 0.4
"""The most that a quantized history takes, as a share of full precision: 4 bits with float32 metadata."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """How much is measured.

    Attributes:
        contenders: the caches, in the order of the tables; the buffer must be among them.
        settings: the conditions, shortest history first: a contender that is too slow is noticed early.
        rounds: timed steps of each contender.
        warmups: steps before them that are not timed.
        flushes: timed flushes.
        limit_s: seconds allowed to fill a cache, and again for all its flushes.
        make_trial: puts a contender to work under a setting.
    """

    contenders: Sequence[Contender]
    settings: Sequence[Setting]
    rounds: int = 21
    warmups: int = 2
    flushes: int = 5
    limit_s: float = 60.0
    make_trial: MakeTrial = LayerTrial

    @property
    def work(self) -> int:
        """Units of progress in all: tokens read."""
        return sum(setting.tokens for setting in self.settings) * len(self.contenders) * self._visits

    @property
    def _visits(self) -> int:
        return self.rounds + self.warmups + self.flushes + 2


@dataclass
class SettingResult:
    """The results of one setting.

    Attributes:
        setting: the conditions.
        measured: the contenders in their order; empty if the setting was left out.
        failure: the reason if it was left out.
    """

    setting: Setting
    measured: list[Measured] = field(default_factory=list)
    failure: str | None = None

    def find(self, label: str) -> Measured | None:
        """Return the results of a contender, or None."""
        return next((one for one in self.measured if one.contender.label == label), None)


def run(plan: BenchmarkPlan, on_progress: OnProgress = lambda label, work: None) -> Iterator[SettingResult]:  # noqa: ARG005
    """Measure setting by setting; each result comes as soon as it is complete."""
    seen: list[SettingResult] = []
    for setting in plan.settings:
        result = SettingResult(setting, failure=_find_lack_of_memory(plan, setting))
        if result.failure is None:
            result.measured = [Measured(contender) for contender in plan.contenders]
            with torch.inference_mode():
                _measure(plan, result, seen, on_progress)
        else:
            on_progress("memory", setting.tokens * len(plan.contenders) * plan._visits)
        seen.append(result)
        yield result


def _measure(
    plan: BenchmarkPlan, result: SettingResult, seen: Sequence[SettingResult], on_progress: OnProgress
) -> None:
    trials = []
    for one in result.measured:
        one.failure = find_slowness(plan, one.contender, result.setting, seen)
        trial = _fill(plan, one, result.setting) if one.failure is None else None
        if trial is not None:
            trials.append((one, trial))
        left_out = 1 + (0 if trial else plan._visits - 1)
        on_progress(one.contender.label, result.setting.tokens * left_out)
    for number in range(-plan.warmups, plan.rounds):
        for one, trial in _turned(trials, number):
            _take_step(one, trial, number)
            on_progress(one.contender.label, result.setting.tokens)
    for one, trial in trials:
        one.transient_bytes = _measure_memory(trial)
        one.kernel, one.relative_error = trial.kernel, trial.find_error()
        on_progress(one.contender.label, result.setting.tokens)
    for one, trial in trials:
        _measure_flushes(plan, one, trial)
        on_progress(one.contender.label, result.setting.tokens * plan.flushes)


def _fill(plan: BenchmarkPlan, one: Measured, setting: Setting) -> Trial | None:
    """Return the contender with its history; if that is impossible, None, and the result has the reason."""
    try:
        trial = plan.make_trial(one.contender, setting, plan.rounds + plan.warmups + MEMORY_STEPS)
        start = time.perf_counter()
        trial.fill()
        one.fill_s = time.perf_counter() - start
    except (ImportError, KVQError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if one.contender.kind == "full precision":
            raise
        one.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    one.held_bytes = count_held_bytes(trial.cache)
    one.flush_interval = flush_interval(trial.cache)
    return trial


def _take_step(one: Measured, trial: Trial, number: int) -> None:
    """Take one step; if a flush is due, let it pass untimed first, to keep rounds comparable."""
    if steps_before_flush(trial.cache) == 0:
        trial.extend(1)
    trial.prepare(number)
    elapsed = time_call(trial.step, trial.setting.device)
    if number >= 0:
        one.steps_ms.append(elapsed)


def _measure_memory(trial: Trial) -> int:
    """Return the transient bytes of a step that does not flush."""
    trial.prepare(0)
    waiting = steps_before_flush(trial.cache)
    if waiting is not None and waiting < MEMORY_STEPS:
        trial.extend(waiting + 1)
    return transient_bytes(trial.step, trial.setting.device)


def _measure_flushes(plan: BenchmarkPlan, one: Measured, trial: Trial) -> None:
    start = time.perf_counter()
    for number in range(plan.flushes):
        waiting = steps_before_flush(trial.cache)
        if waiting is None or time.perf_counter() - start > plan.limit_s:
            return
        trial.extend(waiting)
        trial.prepare(number)
        one.flushes_ms.append(time_call(trial.step, trial.setting.device))


def _turned(trials: list[tuple[Measured, Trial]], number: int) -> list[tuple[Measured, Trial]]:
    first = number % len(trials)
    return trials[first:] + trials[:first]


def _find_lack_of_memory(plan: BenchmarkPlan, setting: Setting) -> str | None:
    available = find_available_bytes(setting.device)
    quantized = sum(contender.kind != "full precision" for contender in plan.contenders)
    needed = setting.states_bytes * (FULL_PRECISION_COPIES + QUANTIZED_SHARE * quantized)
    if available is None or needed <= MEMORY_SHARE * available:
        return None
    return f"not measured: takes about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"


def find_slowness(
    plan: BenchmarkPlan, contender: Contender, setting: Setting, seen: Sequence[SettingResult]
) -> str | None:
    """Return the reason to leave a contender out: by its speed at fewer tokens, filling it would take too long."""
    for earlier in seen:
        for one in earlier.measured:
            if one.contender.label == contender.label and one.fill_s is not None:
                expected = one.fill_s * setting.tokens / earlier.setting.tokens
                if expected > plan.limit_s:
                    return (
                        f"not measured: quantizing {setting.tokens:,} tokens would take about {expected:.0f} s "
                        f"({one.fill_s:.1f} s for {earlier.setting.tokens:,}); --limit allows {plan.limit_s:.0f} s"
                    )
    return None
