"""What trials of kernels found on this machine, kept on disk: a verdict for each kernel, its code and the device.

The name of a file is a digest of everything that a verdict depends on. A file that is damaged, or about something else,
counts as none: the kernel is tried again and the file rewritten. It must not know how a kernel is tried.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq.attention.dispatch.kernel import BenchmarkedKernel
from kvq.attention.machine.kept_files import (
    keep_file,
    open_private_folder,
    read_private_file,
    remove_file,
    remove_unfinished,
)
from kvq.attention.machine.processor import describe_processor, name_processor
from kvq.attention.proving.benchmark_records import device_class

_LOG = logging.getLogger("kvq")
_FOLDER = "verdicts"
_LIMIT_BYTES = 1 << 20
"""The longest file that is read; ours take about 1,000 bytes."""
FORMAT = 4
"""The format of the files. It changes with the trial too: old verdicts then count no more."""


class Subject(BaseModel):
    """The subject of a verdict; where any of it changes, the verdict does not apply.

    Attributes:
        kernel: the kernel's name.
        source: digest of the kernel's code.
        device_class: as in the shipped records.
        device: digest of the facts in which devices of one class differ, on a processor torch's threads among them.
        torch: torch's version.
        format: the format of the file, and of the trial.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: str
    source: str
    device_class: str
    device: str
    torch: str
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        """The name of the file that keeps the verdict."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]
        return f"{self.kernel}-{digest}.json"


class Verdict(BaseModel):
    """The result of a trial.

    Attributes:
        subject: the kernel that was tried, and where.
        device_name: the name that people know the device by.
        fault: why the kernel is not right, in a few words; None where it is.
        obstacle: why it could not be tried, which holds for the moment only; None where it could.
        relative_error: the largest difference from the reference in fp32; None where that is not a number.
        checks: requests that were compared.
        over: name of the kernel that runs otherwise, or None where time was not taken.
        own_ms, other_ms: milliseconds of one step of this kernel and of the other; the least of those taken.
        seconds: duration of the trial.
        made_at: ISO date and time of the trial, in UTC.
        kvq: kvq's version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    subject: Subject
    device_name: str
    fault: str | None = None
    obstacle: str | None = None
    relative_error: Annotated[float, Field(ge=0)] | None = None
    checks: int = Field(default=0, ge=0)
    over: str | None = None
    own_ms: Annotated[float, Field(gt=0)] | None = None
    other_ms: Annotated[float, Field(gt=0)] | None = None
    seconds: float = Field(ge=0)
    made_at: str
    kvq: str

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the other kernel; None where time was not taken."""
        return self.other_ms / self.own_ms if self.own_ms and self.other_ms else None

    @property
    def is_passing(self) -> bool:
        """Whether the kernel is the default: right, and faster than the kernel that runs otherwise."""
        return not (self.fault or self.obstacle) and self.speedup is not None and self.speedup > 1

    def describe(self) -> str:
        """Return the finding in a few words."""
        if self.fault is not None:
            return f"found wrong here: {self.fault}"
        if self.obstacle is not None:
            return f"could not be tried here: {self.obstacle}"
        if self.speedup is None:
            return "tried here, but time was not taken"
        pace = f"{self.speedup:.1f} times as fast as {self.over!r}" if self.speedup >= 1 else (
            f"slower here than {self.over!r}, {self.own_ms:.2f} against {self.other_ms:.2f} ms a step"
        )  # fmt: skip
        return f"{pace}, right within {self.relative_error or 0:.0e}"


def make_subject(kernel: BenchmarkedKernel, device: torch.device) -> Subject:
    """Return the subject of a verdict on a kernel, on a device of this machine."""
    return Subject(
        kernel=kernel.name,
        source=kernel.source_digest(),
        device_class=device_class(device),
        device=hashlib.sha256(_device_facts(device).encode()).hexdigest()[:16],
        torch=torch.__version__,
    )


def name_device(device: torch.device) -> str:
    """Return how people call a device of this machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name_processor()


def find_kept(subject: Subject) -> Verdict | None:
    """Return the verdict that is kept on disk, or None."""
    try:
        data = read_private_file(open_private_folder(_FOLDER) / subject.file_name, _LIMIT_BYTES)
    except OSError:
        return None
    if data is None:
        return None
    try:
        verdict = Verdict.model_validate_json(data)
    except ValidationError:
        return None
    return verdict if verdict.subject == subject else None


def keep(verdict: Verdict) -> None:
    """Keep a verdict for later processes, in place of an earlier one of the same subject.

    Where that fails, it holds for this process only, and one warning says so; the earlier one is deleted all the same.
    """
    try:
        text = json.dumps(verdict.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
        folder = open_private_folder(_FOLDER)
        keep_file(folder / verdict.subject.file_name, text.encode())
        remove_unfinished(folder)
    except (OSError, ValueError) as error:
        forget(verdict.subject)
        _tell_once(str(error))


def forget(subject: Subject) -> None:
    """Delete the verdict that is kept on disk, if there is one."""
    with suppress(OSError):
        remove_file(open_private_folder(_FOLDER) / subject.file_name)


def facts_of(verdict: Verdict) -> dict[str, Any]:
    """Return the facts of a verdict for `kvq doctor --json`."""
    return {
        "passing": verdict.is_passing,
        "relative_error": verdict.relative_error,
        "speedup": verdict.speedup,
        "over": verdict.over,
        "own_ms": verdict.own_ms,
        "other_ms": verdict.other_ms,
        "checks": verdict.checks,
        "seconds": verdict.seconds,
        "made_at": verdict.made_at,
    }


@cache
def _tell_once(reason: str) -> None:
    _LOG.warning("the verdict of a kernel trial holds for this process only; it cannot be saved: %s", reason)


def _device_facts(device: torch.device) -> str:
    if device.type == "cpu":
        facts = describe_processor(), torch.backends.cpu.get_cpu_capability(), f"threads: {torch.get_num_threads()}"
        return "\n".join(facts)
    return name_device(device)
