"""Trying a kernel on the spot: is it right, and faster than the kernel that would run otherwise?

The trial runs in a thread of its own: grad mode, autocast, default device and dispatch modes of the caller neither
reach it nor are changed by it. It draws from generators of its own. A clock bounds it: no step begins that would not
fit, judging by the last one of its kind; a running step is waited for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial

import torch

from kvq.attention.dispatch.kernel import BenchmarkedKernel, Kernel
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.attention.proving.samples import Sample
from kvq.attention.proving.verdicts import Subject, Verdict, name_device
from kvq.installed import find_version
from kvq.plugin_api.granularity import Granularity

_LOG = logging.getLogger("kvq")

BUDGET_SECONDS = 2.0
"""The time for a trial; no step begins that would not fit."""
CHECKING_SHARE = 0.4
"""The share of the budget for requests that are compared and not timed."""
MOST_ROUNDS = 15
LONGEST_FAULT = 300
"""Characters that are kept of an error that a kernel raised."""

_CHANNEL, _TOKEN = Granularity.PER_CHANNEL, Granularity.PER_TOKEN
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16

CHECKS = (
    Sample(stored=700, group_size=64, head_dim=128, sinks=4),
    Sample(dtypes=(_BF16, _BF16, _BF16), bits=(4, 2), group_size=64, batch=2, mask="bool", sinks=3),
    Sample(bits=(2, 8), axes=(_TOKEN, _CHANNEL), is_reordered=True, batch=2, metadata=_F32),
    Sample(dtypes=(_F32, _F32, _BF16), bits=(8, 4), is_rotated=True, balanced=(True, False), queries=3),
    Sample(stored=2600, bits=(4, 4), axes=(_TOKEN, _TOKEN), heads=1),
    Sample(dtypes=(_F16, _F16, _F16), bits=(3, 5), axes=(_CHANNEL, _CHANNEL), balanced=(True, True), softcap=3.0),
    Sample(bits=(1, 7), head_dim=80, mask="additive", has_logits=True, sharing=1),
    Sample(bits=(6, 3), axes=(_TOKEN, _TOKEN), group_size=64, head_dim=64, sharing=8),
    Sample(bits=(3, 2), axes=(_CHANNEL, _CHANNEL), balanced=(True, True), is_rotated=True, metadata=torch.int8),
    Sample(dtypes=(_BF16, _BF16, _BF16), bits=(2, 4), axes=(_TOKEN, _TOKEN), metadata=torch.int8),
)
"""The requests that are compared with the reference after `TIMED`, the most usual first."""
TIMED = Sample(
    stored=1024,
    heads=8,
    head_dim=128,
    group_size=64,
    dtypes=(_BF16, _BF16, _BF16),
    bits=(4, 2),
    axes=(_CHANNEL, _CHANNEL),
    is_rotated=True,
    balanced=(True, True),
)
"""The request that is timed, and compared first: a step of one layer of a model of 7 or 8 billion parameters, as stored
by default."""


@dataclass
class Finding:
    """The result of a trial so far.

    Attributes:
        fault: why the kernel is not right, or None.
        obstacle: why it could not be tried, which says nothing of the kernel; or None.
        error: the largest relative difference in fp32.
        checks: requests that were compared.
        over: name of the other kernel whose time was taken.
        own_ms, other_ms: the least time of one step.
        is_lasting: whether another trial would find the same; an error that a kernel raised may have been bad luck.
    """

    fault: str | None = None
    obstacle: str | None = None
    error: float = 0.0
    checks: int = 0
    over: str | None = None
    own_ms: float | None = None
    other_ms: float | None = None
    is_lasting: bool = False

    def add_times(self, over: str, own: float, other: float) -> None:
        """Note seconds of one step of the kernel and of another one."""
        own, other = (max(1e3 * one, 1e-6) for one in (own, other))  # a clock may be coarse
        self.over = over
        self.own_ms = own if self.own_ms is None else min(own, self.own_ms)
        self.other_ms = other if self.other_ms is None else min(other, self.other_ms)


def prove(
    kernel: BenchmarkedKernel,
    others: Sequence[Kernel],
    subject: Subject,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Verdict, bool]:
    """Try a kernel on a device.

    Args:
        kernel: a kernel that is available.
        others: the kernels that may run in its place, the preferred first.
        subject: the verdict's subject.
        device: where it is tried.
        clock: returns seconds.

    Returns:
        The verdict, and whether it is worth keeping.
    """
    trial = _Trial(kernel, others, device, clock)
    _run_apart(trial)
    finding = trial.finding
    verdict = Verdict(
        subject=subject,
        device_name=name_device(device),
        fault=finding.fault,
        obstacle=finding.obstacle,
        relative_error=finding.error if math.isfinite(finding.error) and finding.checks else None,
        checks=finding.checks,
        over=finding.over,
        own_ms=finding.own_ms,
        other_ms=finding.other_ms,
        seconds=max(0.0, clock() - trial.started),
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kvq=find_version("kvq") or "unknown",
    )
    _tell(kernel, verdict)
    return verdict, finding.is_lasting


def take_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes, its work on the device included."""
    _wait_for(device)
    started = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - started


@dataclass
class _Trial:
    """One trial of a kernel, from the first request to the last.

    Attributes:
        kernel, others, device, clock: as for `prove`.
        finding: the result so far.
        stop: set when nobody waits for the result any more.
        started: the clock at the start.
        exempt: seconds that do not count: the first step of a kind compiles, except on processors.
    """

    kernel: Kernel
    others: Sequence[Kernel]
    device: torch.device
    clock: Callable[[], float]
    finding: Finding = field(default_factory=Finding)
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = 0.0
    exempt: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    def run(self) -> None:
        """Compare, then take times, as long as there is time left."""
        request = TIMED.build(self.device)
        first = self._compare(request)
        self._compare_others()
        if self._must_end():
            return
        if first is not None:
            self._race(request, first)
        # Where no time could be taken, another process may have more luck.
        self.finding.is_lasting = first is None or self.finding.over is not None

    def _compare_others(self) -> None:
        cost = 0.0
        for number, sample in enumerate(CHECKS):
            begun = self._spent()
            if self._must_end() or not self._has_room(cost, CHECKING_SHARE * BUDGET_SECONDS):
                return
            self._compare(sample.build(self.device, seed=number))
            cost = self._spent() - begun

    def _compare(self, request: AttentionRequest) -> tuple[float, float] | None:
        """Compare the kernel with the reference on one request, if it serves it; return the seconds of both steps."""
        if self.kernel.why_unsupported(request) is not None:
            return None
        begun, dtype, finding = self.clock(), request.query.dtype, self.finding
        own, output = _time_step(self.kernel, request, self.device)
        if self.device.type != "cpu":
            self.exempt += self.clock() - begun
        other, expected = _time_step(REFERENCE, request, self.device)
        difference = relative_difference(output, expected)
        finding.checks += 1
        if dtype == torch.float32:
            finding.error = max(finding.error, difference)
        if not difference <= TOLERANCE[dtype]:
            finding.is_lasting = True
            finding.fault = (
                f"it differs from the reference by {difference:.1e} of the largest output in "
                f"{str(dtype).removeprefix('torch.')} (at most {TOLERANCE[dtype]:.0e} is accepted)"
            )
        return own, other

    def _race(self, request: AttentionRequest, first: tuple[float, float]) -> None:
        """Take times of the kernel and of the one that would run otherwise, in turns."""
        usable = (one for one in self.others if one.why_unsupported(request) is None and one.why_unavailable() is None)
        other, cost = next(usable, None), sum(first)
        if other is None:
            return
        if other is REFERENCE and self.device.type == "cpu":  # elsewhere the first step compiles
            self.finding.add_times(other.name, *first)
        for _ in range(MOST_ROUNDS):
            if self._must_end() or not self._has_room(cost, BUDGET_SECONDS):
                return
            own, theirs = (_time_step(one, request, self.device)[0] for one in (self.kernel, other))
            self.finding.add_times(other.name, own, theirs)
            cost = own + theirs

    def _spent(self) -> float:
        return self.clock() - self.started - self.exempt

    def _has_room(self, cost: float, budget: float) -> bool:
        """Return whether what costs some seconds would end within a budget."""
        return self._spent() + cost < budget

    def _must_end(self) -> bool:
        return self.finding.fault is not None or self.stop.is_set()


def _time_step(kernel: Kernel, request: AttentionRequest, device: torch.device) -> tuple[float, torch.Tensor]:
    """Return the seconds that a step of a kernel takes, and its output."""
    outputs: list[torch.Tensor] = []
    seconds = take_seconds(partial(_attend_into, outputs, kernel, request), device)
    return seconds, outputs[0]


def _attend_into(outputs: list[torch.Tensor], kernel: Kernel, request: AttentionRequest) -> None:
    outputs.append(kernel.attend(request))


def _run_apart(trial: _Trial) -> None:
    """Run a trial in a thread of its own; an error there becomes a finding that does not last."""
    device, finding = trial.device, trial.finding

    def guarded() -> None:
        try:
            with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                trial.run()
        except Exception as error:  # noqa: BLE001  # any error keeps a kernel from being the default
            finding.is_lasting = False
            text = f"{type(error).__name__}: {error}"
            if _is_lack_of_memory(error):
                finding.obstacle = _shorten(f"not enough memory: {text}")
            else:
                finding.fault = _shorten(f"it raised {text}")

    thread = threading.Thread(target=guarded, name="kvq-kernel-trial", daemon=True)
    try:
        thread.start()
        thread.join()
    except RuntimeError as error:  # the interpreter is going down, or the system gives no more threads
        finding.obstacle = _shorten(str(error))
    finally:
        trial.stop.set()  # Ctrl-C ends the waiting; the thread must not go on alone


def _is_lack_of_memory(error: Exception) -> bool:
    """Return whether memory was short; torch raises a mere RuntimeError on processors."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _shorten(text: str) -> str:
    """Return a text as one line of limited length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_FAULT else f"{line[: LONGEST_FAULT - 3]}..."


def _tell(kernel: Kernel, verdict: Verdict) -> None:
    level = logging.INFO if verdict.fault is None else logging.WARNING
    standing = "the default" if verdict.is_passing else "not used by default"
    _LOG.log(
        level,
        "attention kernel %r on %s: %s; it is %s (tried once, in %.1f s; `kvq doctor` shows it)",
        kernel.name,
        verdict.device_name,
        verdict.describe(),
        standing,
        verdict.seconds,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
