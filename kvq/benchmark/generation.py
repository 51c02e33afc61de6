"""Time forwards of several tokens, and hundreds of decode steps in a row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvq.benchmark.clock import time_call, transient_bytes
from kvq.benchmark.contenders import BUFFER, DYNAMIC, Contender
from kvq.benchmark.setting import Setting
from kvq.benchmark.statistics import Spread, ratio
from kvq.benchmark.trial import ModelTrial

OnProgress = Callable[[str, int], None]

REJECTED_SHARE = 0.5
"""The share of a draft's tokens that the model rejects."""
WARMUPS = 2
"""Forwards that are not timed, since the first one of a kind is checked against the reference."""
PROFILED = 2
"""Forwards needed to count memory."""


@dataclass(frozen=True)
class Forward:
    """One kind of forward.

    Attributes:
        tokens: tokens in each row.
        is_draft: whether they are proposals of assisted decoding, where a part is taken back and the cache records its
            past; else they stay, as in chunked prefill.
    """

    tokens: int
    is_draft: bool = False

    @property
    def rejected(self) -> int:
        """Tokens taken back after each forward."""
        return math.ceil(self.tokens * REJECTED_SHARE) if self.is_draft else 0


@dataclass
class Times:
    """Time and memory of one contender.

    Attributes:
        label: the contender's label.
        times_ms: milliseconds of each forward, in order.
        transient_bytes: rise of memory in one forward above its level afterwards; None if not measured.
        kernel: name of the kernel that read the packed states; empty if none did.
        failure: the reason if nothing was measured.
    """

    label: str
    times_ms: list[float] = field(default_factory=list)
    transient_bytes: int | None = None
    kernel: str = ""
    failure: str | None = None

    def percentile(self, share: float) -> float:
        """Return the time that this share of all do not exceed, in milliseconds."""
        return sorted(self.times_ms)[math.ceil(share * len(self.times_ms)) - 1]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        count: timed forwards of each contender.
        limit_s: seconds that these may take for one contender, estimated from the forward before them.
        make_trial: puts a contender to work.
        on_progress: called with a label and the number of forwards done.
    """

    count: int
    limit_s: float
    make_trial: Callable[[Contender, Setting, int], ModelTrial]
    on_progress: OnProgress = lambda label, work: None  # noqa: ARG005


@torch.inference_mode()
def measure_forwards(
    contenders: Sequence[Contender], setting: Setting, forward: Forward, effort: Effort
) -> dict[str, Any]:
    """Return the times of forwards of several tokens after a history, as plain values; the contenders take turns.

    Args:
        contenders: the caches; `DynamicCache` must be among them.
        setting: the history, and the shape of the model.
        forward: the kind of forward.
        effort: the number of forwards.
    """
    found = [Times(one.label) for one in contenders]
    trials = [_prepare(one, setting, forward, effort) for one in contenders]
    _take_turns(found, trials, effort)
    for one, trial in zip(found, trials, strict=True):
        if one.times_ms:
            trial.prepare(0)
            one.transient_bytes, one.kernel = transient_bytes(trial.step, setting.device), trial.kernel
    dynamic, buffer = (next((one for one in found if one.label == label), None) for label in (DYNAMIC, BUFFER))
    return {
        **setting.to_dict(),
        "shape": asdict(setting.shape),
        "tokens": forward.tokens,
        "rejected": forward.rejected,
        "contenders": [_describe_forwards(one, dynamic, buffer) for one in found],
    }


@torch.inference_mode()
def measure_steps(contenders: Sequence[Contender], setting: Setting, effort: Effort) -> dict[str, Any]:
    """Return the distribution of the times of many decode steps in a row, flushes included, as plain values.

    Args:
        contenders: the caches, which take turns.
        setting: the history before the first step, and the shape of the model.
        effort: the number of steps.
    """
    found = [Times(one.label) for one in contenders]
    _take_turns(found, [_prepare(one, setting, Forward(1), effort) for one in contenders], effort)
    return {
        **setting.to_dict(),
        "shape": asdict(setting.shape),
        "steps": effort.count,
        "contenders": [_describe_steps(one) for one in found],
    }


def choose_for_forwards(contenders: Sequence[Contender]) -> list[Contender]:
    """Return `DynamicCache`, the fastest full precision of torch, and our caches read packed."""
    return [one for one in contenders if one.label in (DYNAMIC, BUFFER) or _is_fused(one)]


def choose_for_steps(contenders: Sequence[Contender]) -> list[Contender]:
    """Return the buffer, and our caches read packed."""
    return [one for one in contenders if one.label == BUFFER or _is_fused(one)]


def _is_fused(contender: Contender) -> bool:
    return contender.kind == "kvq" and not contender.is_variant


def _prepare(contender: Contender, setting: Setting, forward: Forward, effort: Effort) -> ModelTrial:
    trial = effort.make_trial(contender, setting, (effort.count + WARMUPS + PROFILED) * forward.tokens)
    effort.on_progress(contender.label, 0)
    trial.fill()
    trial.width, trial.rejected = forward.tokens, forward.rejected
    if forward.is_draft:
        trial.cache.activate_past_recording()
    return trial


def _take_turns(found: Sequence[Times], trials: Sequence[ModelTrial], effort: Effort) -> None:
    for number in range(-WARMUPS, effort.count):
        for one, trial in zip(found, trials, strict=True):
            if one.failure is None:
                trial.prepare(number + WARMUPS)
                elapsed = time_call(trial.step, trial.setting.device)
                _keep(one, elapsed, number, effort)
            effort.on_progress(one.label, 1)


def _keep(one: Times, elapsed_ms: float, number: int, effort: Effort) -> None:
    expected_s = elapsed_ms * effort.count / 1e3
    if number >= 0:
        one.times_ms.append(elapsed_ms)
    elif number == -1 and expected_s > effort.limit_s:
        one.failure = (
            f"not measured: {effort.count} forwards would take about {expected_s:.0f} s; {effort.limit_s:.0f} s are "
            "allowed"
        )


def _describe_forwards(one: Times, dynamic: Times | None, buffer: Times | None) -> dict[str, Any]:
    return {
        "label": one.label,
        "time_ms": asdict(Spread.of(one.times_ms)) if one.times_ms else None,
        "to_dynamic": _ratio(one, dynamic),
        "to_buffer": _ratio(one, buffer),
        "transient_bytes": one.transient_bytes,
        "kernel": one.kernel,
        "failure": one.failure,
    }


def _ratio(one: Times, other: Times | None) -> dict[str, Any] | None:
    if other is None or not one.times_ms or not other.times_ms:
        return None
    return asdict(ratio(one.times_ms, other.times_ms))


def _describe_steps(one: Times) -> dict[str, Any]:
    if not one.times_ms:
        return {"label": one.label, "median_ms": None, "failure": one.failure}
    median, late = statistics.median(one.times_ms), one.percentile(0.99)
    return {
        "label": one.label,
        "median_ms": median,
        "p99_ms": late,
        "longest_ms": max(one.times_ms),
        "p99_to_median": late / median,
        "failure": None,
    }
