"""What is known of a kernel that needs a benchmark: a trial on this machine, a shipped record, or nothing yet.

A trial made here counts more than a record made elsewhere. It must not know which kernels exist.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvq.attention.dispatch.kernel import BenchmarkedKernel, Kernel
from kvq.attention.machine.variables import KERNEL_VARIABLE, ON_OFF, TRIALS_VARIABLE, read_variable
from kvq.attention.proving import verdicts
from kvq.attention.proving.benchmark_records import device_class, find_benchmark_record
from kvq.attention.proving.trial import prove
from kvq.attention.proving.verdicts import Subject, Verdict
from kvq.errors import ConfigError, Fault

Origin = Literal["measured here", "shipped record", "none"]


@dataclass(frozen=True)
class Standing:
    """What is known of a kernel on a device.

    Attributes:
        origin: where this knowledge comes from.
        reason: why the kernel is not a default, or None if it is one.
        verdict: the verdict of the trial on this machine, or None.
        record: the shipped record, or None.
    """

    origin: Origin
    reason: str | None
    verdict: Verdict | None = None
    record: Mapping[str, Any] | None = None


_LOCK = threading.Lock()
"""One trial at a time in a process, whichever registry wants it: two would slow each other down."""


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A process that was forked during a trial would wait for a thread that it does not have.
    os.register_at_fork(after_in_child=_renew_lock)


def are_trials_on() -> bool:
    """Return whether kernels are tried on this machine, as `KVQ_KERNEL_TRIALS` says.

    Raises:
        ConfigError: the variable says neither yes nor no.
    """
    text = read_variable(TRIALS_VARIABLE)
    if text is None:
        return True
    if text.lower() not in ON_OFF:
        problem = f"{text!r} is neither on nor off; choose one of {', '.join(map(repr, ON_OFF))}"
        raise ConfigError([Fault((TRIALS_VARIABLE,), problem)], source="the environment")
    return ON_OFF[text.lower()]


class Standings:
    """The standing of kernels, with the verdicts that are known so far: made here, or read from disk."""

    def __init__(self) -> None:
        self._verdicts: dict[Subject, Verdict] = {}

    def find(
        self, kernel: BenchmarkedKernel, device: torch.device, others: Sequence[Kernel] = (), *, may_try: bool = False
    ) -> Standing:
        """Return what is known of a kernel on a device, by a trial now where nothing is.

        Args:
            kernel: one that needs a benchmark.
            device: where it would run.
            others: the kernels that would run in its place, the preferred first; only a trial asks them.
            may_try: whether it may be tried now, which takes about two seconds once.

        Raises:
            ConfigError: `KVQ_KERNEL_TRIALS` says neither yes nor no.
        """
        record, is_on = find_benchmark_record(kernel.name, device_class(device)), are_trials_on()
        if is_on:
            problem = kernel.why_unavailable()
            if problem is not None:
                return Standing("none", problem)
            verdict = self._find_verdict(kernel, device)
            if verdict is None and record is None and may_try and not _is_bad_moment(device):
                verdict = self._try_once(kernel, device, others)
            if verdict is not None:
                return _judge(verdict, record)
        if record is not None:
            return Standing("shipped record", None, record=record)
        return Standing("none", _describe_lack(kernel, device, is_on=is_on))

    def try_again(self, kernel: BenchmarkedKernel, device: torch.device, others: Sequence[Kernel]) -> Standing:
        """Try a kernel that is available, even if it was tried before, and keep the new verdict."""
        with _LOCK:
            return _judge(self._try(verdicts.make_subject(kernel, device), kernel, device, others))

    def _try_once(self, kernel: BenchmarkedKernel, device: torch.device, others: Sequence[Kernel]) -> Verdict:
        with _LOCK:
            # Another thread may have tried it while this one waited.
            known = self._find_verdict(kernel, device)
            return known or self._try(verdicts.make_subject(kernel, device), kernel, device, others)

    def _try(
        self, subject: Subject, kernel: BenchmarkedKernel, device: torch.device, others: Sequence[Kernel]
    ) -> Verdict:
        verdict, is_lasting = prove(kernel, others, subject, device)
        if verdict.obstacle is not None:  # a passing one: it says nothing of the kernel
            return verdict
        self._verdicts[subject] = verdict
        if is_lasting:
            verdicts.keep(verdict)
        else:
            verdicts.forget(subject)  # an earlier verdict is in doubt
        return verdict

    def _find_verdict(self, kernel: BenchmarkedKernel, device: torch.device) -> Verdict | None:
        subject = verdicts.make_subject(kernel, device)
        verdict = self._verdicts.get(subject) or verdicts.find_kept(subject)
        if verdict is not None:
            self._verdicts[subject] = verdict
        return verdict


def _judge(verdict: Verdict, record: Mapping[str, Any] | None = None) -> Standing:
    return Standing("measured here", None if verdict.is_passing else verdict.describe(), verdict, record)


def _is_bad_moment(device: torch.device) -> bool:
    """Return whether a model is being traced or recorded: the trial would become a part of it."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _describe_lack(kernel: BenchmarkedKernel, device: torch.device, *, is_on: bool) -> str:
    if is_on:
        return "not tried on this machine yet; its first use tries it, in about 2 s, and so does `kvq doctor --prove`"
    return (
        f"no record proves it on {device_class(device)}, and {TRIALS_VARIABLE} switches trials off; "
        f"{KERNEL_VARIABLE}={kernel.name} uses it all the same, after a check against the reference"
    )
