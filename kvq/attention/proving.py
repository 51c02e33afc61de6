"""Trying a kernel on the spot: is it right, and faster than what would run otherwise?

The trial runs in a thread of its own, so that it neither feels nor changes what the caller has set for itself: grad
mode, autocast, the default device, modes of dispatch. It draws from generators of its own, and is bound by a clock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import torch

from kvq.attention.comparison import TOLERANCE, relative_difference
from kvq.attention.eager import REFERENCE
from kvq.attention.kernel_contract import Kernel, ProvenKernel
from kvq.attention.request import AttentionRequest
from kvq.attention.samples import Sample
from kvq.attention.verdicts import Subject, Verdict, name_device
from kvq.granularity import Granularity
from kvq.installed import find_version

_LOG = logging.getLogger("kvq")

BUDGET_SECONDS = 2.0
"""What a trial may take; it ends with the step in hand."""
CHECKING_SHARE = 0.4
"""Of the budget, after which no further request is compared."""
LEAST_ROUNDS = 2
"""Rounds that time is taken in, whatever they take; what comes before them warms both kernels up."""
MOST_ROUNDS = 15

_CHANNEL, _TOKEN = Granularity.PER_CHANNEL, Granularity.PER_TOKEN
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16

CHECKS = (
    Sample(stored=700, group_size=64, head_dim=128, sinks=4),
    Sample(dtypes=(_BF16, _BF16, _BF16), bits=(4, 2), group_size=64, batch=2, mask="bool", sinks=3),
    Sample(bits=(2, 8), axes=(_TOKEN, _CHANNEL), is_reordered=True, batch=2, metadata=_F32),
    Sample(dtypes=(_F32, _F32, _BF16), bits=(8, 4), is_rotated=True, queries=3),
    Sample(stored=2600, bits=(4, 4), axes=(_TOKEN, _TOKEN), heads=1),
    Sample(dtypes=(_F16, _F16, _F16), bits=(3, 5), axes=(_CHANNEL, _CHANNEL), softcap=3.0),
    Sample(bits=(1, 7), head_dim=80, mask="additive", has_logits=True, sharing=1),
    Sample(bits=(6, 3), axes=(_TOKEN, _TOKEN), group_size=64, head_dim=64, sharing=8),
)
"""What is compared with the reference, the most usual first."""
TIMED = Sample(stored=2048, heads=8, head_dim=128, group_size=64, dtypes=(_BF16, _BF16, _BF16))
"""What time is taken of: one step of one layer of a model of 7 or 8 billion parameters."""


@dataclass
class Finding:
    """What a trial has found so far.

    Attributes:
        fault: why the kernel is not right, or None.
        error: the largest relative difference in fp32.
        checks: requests that were compared.
        over: name of the other kernel whose time was taken.
        own_ms, other_ms: the least time of one step.
        is_lasting: whether it would be found again; what a kernel raised may have been bad luck.
    """

    fault: str | None = None
    error: float = 0.0
    checks: int = 0
    over: str | None = None
    own_ms: float | None = None
    other_ms: float | None = None
    is_lasting: bool = True


def prove(
    kernel: ProvenKernel,
    others: Sequence[Kernel],
    subject: Subject,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Verdict, bool]:
    """Try a kernel on a device.

    Args:
        kernel: one without a problem.
        others: what may run in its place, the preferred first.
        subject: of the verdict.
        device: where to.
        clock: seconds.

    Returns:
        The verdict, and whether it is worth keeping.
    """
    started, finding = clock(), Finding()
    _run_apart(lambda: _examine(kernel, others, device, finding, clock), device, finding)
    known = finding.error < float("inf") and finding.checks > 0
    verdict = Verdict(
        subject=subject,
        device_name=name_device(device),
        fault=finding.fault,
        relative_error=finding.error if known else None,
        checks=finding.checks,
        over=finding.over,
        own_ms=finding.own_ms,
        other_ms=finding.other_ms,
        seconds=clock() - started,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kvq=find_version("kvq") or "unknown",
    )
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
    return verdict, finding.is_lasting


def take_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return what an action takes, its work on the device included."""
    _wait_for(device)
    started = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - started


def _examine(
    kernel: Kernel, others: Sequence[Kernel], device: torch.device, finding: Finding, clock: Callable[[], float]
) -> None:
    started = clock()
    for number, sample in enumerate(CHECKS):
        if finding.checks and clock() - started > CHECKING_SHARE * BUDGET_SECONDS:
            break
        _compare(kernel, sample.build(device, seed=number), finding)
        if finding.fault is not None:
            return
    request = TIMED.build(device)
    _compare(kernel, request, finding)
    other = next((one for one in others if one.find_obstacle(request) is None and one.find_problem() is None), None)
    if finding.fault is not None or other is None or kernel.find_obstacle(request) is not None:
        return
    other.attend(request)
    finding.over = other.name
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and clock() - started > BUDGET_SECONDS:
            break
        _take_times(kernel, other, request, device, finding)


def _compare(kernel: Kernel, request: AttentionRequest, finding: Finding) -> None:
    """Compare a kernel with the reference on one request, if it serves it."""
    if kernel.find_obstacle(request) is not None:
        return
    dtype = request.query.dtype
    difference = relative_difference(kernel.attend(request), REFERENCE.attend(request))
    finding.checks += 1
    if dtype == torch.float32:
        finding.error = max(finding.error, difference)
    if not difference <= TOLERANCE[dtype]:
        finding.fault = (
            f"it differs from the reference by {difference:.1e} of the largest output in "
            f"{str(dtype).removeprefix('torch.')} (at most {TOLERANCE[dtype]:.0e} is accepted)"
        )


def _take_times(
    kernel: Kernel, other: Kernel, request: AttentionRequest, device: torch.device, finding: Finding
) -> None:
    own, theirs = (1e3 * take_seconds(partial(one.attend, request), device) for one in (kernel, other))
    finding.own_ms = own if finding.own_ms is None else min(own, finding.own_ms)
    finding.other_ms = theirs if finding.other_ms is None else min(theirs, finding.other_ms)


def _run_apart(action: Callable[[], None], device: torch.device, finding: Finding) -> None:
    """Run in a thread of its own; what is raised there becomes a finding that does not last."""

    def guarded() -> None:
        try:
            with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                action()
        except Exception as error:  # noqa: BLE001  # whatever a kernel raises keeps it from being the default
            finding.fault, finding.is_lasting = f"it raised {type(error).__name__}: {error}", False

    thread = threading.Thread(target=guarded, name="kvq-kernel-trial", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # the interpreter is going down, or the system gives no more threads
        finding.fault, finding.is_lasting = f"it could not be tried: {error}", False
        return
    thread.join()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
