"""Examine an installation for `kvq doctor`: versions, devices, backends, and problems, each with its remedy.

It must work even if kvq does not: metadata is read first, and every heavy import is an examination of its own, whose
failure is a problem and not a crash.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.specifiers import SpecifierSet

import kvq
from kvq.cli.console import one_line
from kvq.cli.kernel_facts import list_kernels
from kvq.cli.requirement_state import describe_requirements
from kvq.errors import KVQError
from kvq.installed import find_version, is_accepted

if TYPE_CHECKING:
    from kvq.registry import BackendInfo

LISTED_WITHOUT_METADATA = ("torch", "transformers", "pydantic", "pluggy")
"""Distributions to list if kvq's own requirements cannot be read."""

REINSTALL = "run `pip install -e .` in the checkout of kvq"

_LIST_VARIABLES = ("KVQ_PLUGINS", "KVQ_BLOCK_PLUGINS")
_KERNEL_VARIABLES = ("KVQ_ATTENTION_KERNEL", "KVQ_KERNEL_TRIALS", "KVQ_CC", "KVQ_KERNEL_CFLAGS")
_VARIABLES = (*_LIST_VARIABLES, *_KERNEL_VARIABLES)


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it.

    Attributes:
        severity: an `error` stops a backend or the package, a `warning` does not.
        problem: the problem in one line.
        remedy: how to solve it.
    """

    severity: Literal["error", "warning"]
    problem: str
    remedy: str


@dataclass
class Diagnosis:
    """Everything found; each field but `problems` holds plain values."""

    kvq: dict[str, Any] = field(default_factory=dict)
    platform: str = ""
    distributions: list[dict[str, Any]] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        """Whether no problem stops a backend or the package."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "usable": self.is_usable}

    def add_error(self, problem: str, remedy: str) -> None:
        """Note something that stops a backend or the package."""
        self.problems.append(Problem("error", one_line(problem), remedy))

    def add_warning(self, problem: str, remedy: str) -> None:
        """Note something that does not."""
        self.problems.append(Problem("warning", one_line(problem), remedy))


def diagnose(*, prove: bool = False) -> Diagnosis:
    """Examine everything; the output of libraries goes to stderr.

    Args:
        prove: try every kernel of attention that can run here, even one that has a verdict already.
    """
    found = Diagnosis(platform=platform.platform())
    with contextlib.redirect_stdout(sys.stderr):
        is_installed = _examine_installation(found)
        _examine_distributions(found, is_installed=is_installed)
        found.environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if _can_import("torch", found):
            _examine_devices(found)
            if _can_import("kvq.registry", found):
                _examine_backends(found)
            if _can_import("kvq.cache", found):
                _examine_kernels(found, prove=prove)
    return found


def _examine_installation(found: Diagnosis) -> bool:
    """Note which kvq this is; return whether its metadata can be relied on."""
    installed = find_version("kvq")
    found.kvq = {"version": kvq.__version__, "installed": installed, "location": str(Path(kvq.__file__).parent)}
    if installed is None:
        found.add_error("kvq is not installed, only found on the path, so no backend is registered", REINSTALL)
    elif installed.startswith("0."):
        found.add_error(
            f"the kvq {installed} of the package index is installed, another package, which does not run",
            f"run `pip uninstall kvq`, then {REINSTALL.removeprefix('run ')}",
        )
    elif installed != kvq.__version__:
        found.add_warning(f"kvq {installed} is installed, but the code is that of {kvq.__version__}", REINSTALL)
    return installed == kvq.__version__


def _examine_distributions(found: Diagnosis, *, is_installed: bool) -> None:
    found.distributions = list(_list_distributions(is_installed=is_installed))
    for one in found.distributions:
        if one["met"]:
            continue
        wanted = f"{one['name']}{one['required']}"
        has = f"{one['name']} {one['installed']} is installed" if one["installed"] else f"{one['name']} is missing"
        remedy = "use such a Python" if one["name"] == "python" else f"run `pip install '{wanted}'`"
        found.add_error(f"{has}; kvq needs {wanted}", remedy)


def _list_distributions(*, is_installed: bool) -> Iterator[dict[str, Any]]:
    wanted = (metadata.metadata("kvq")["Requires-Python"] or "") if is_installed else ""
    version = platform.python_version()
    met = is_accepted(version, SpecifierSet(wanted))
    yield {"name": "python", "required": wanted, "installed": version, "met": met}
    requirements = (metadata.requires("kvq") or ()) if is_installed else LISTED_WITHOUT_METADATA
    yield from describe_requirements(tuple(requirements), extra="cli")


def _can_import(module: str, found: Diagnosis) -> bool:
    try:
        import_module(module)
    except Exception as error:  # noqa: BLE001  # a broken installation raises anything; telling is what this is for
        remedy = "repair or reinstall the module that it names; the versions above say which are supported"
        told, origin = f"{module} cannot be imported: {type(error).__name__}: {error}", _find_origin(error)
        if origin is not None and origin is not error:
            told = f"{told} ({type(origin).__name__}: {origin})"
            if package := _find_package(origin):
                remedy = f"update {package}, in whose code that is raised, or uninstall it if you can do without"
        found.add_error(told, remedy)
        return False
    return True


def _find_origin(error: BaseException) -> BaseException:
    """Return the error that an error comes from, first of all; libraries that import lazily hide it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _find_package(error: BaseException) -> str | None:
    """Return the name of the installed package whose code raised an error, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    places = [place for place, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return parts[places[-1] + 1].removesuffix(".py") if places and len(parts) > places[-1] + 1 else None


def _examine_devices(found: Diagnosis) -> None:
    import torch

    found.devices.append({"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()})
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        found.devices.append({"device": f"cuda:{index}", "name": known.name, "memory_bytes": known.total_memory})
    if torch.backends.mps.is_available():
        found.devices.append({"device": "mps", "name": "Apple GPU"})
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        found.add_warning(
            f"this machine has nvidia-smi, but torch {torch.__version__} finds no CUDA device",
            "to use a GPU, install a build of torch for the CUDA version of your driver (https://pytorch.org)",
        )


def _examine_kernels(found: Diagnosis, *, prove: bool) -> None:
    """Note for each device which kernels of attention are defaults there, and the reasons for and against each."""
    try:
        found.kernels = list_kernels([one["device"] for one in found.devices], prove=prove)
    except KVQError as error:
        found.add_error(str(error), "correct or unset the variable that it names")
    for one in found.kernels:
        if one["default"] and one["fault"] is not None:
            problem = f"KVQ_ATTENTION_KERNEL names {one['name']!r}, which was found wrong on {one['device']}"
            found.add_warning(f"{problem}: {one['fault']}", "unset KVQ_ATTENTION_KERNEL, or name another kernel")


def _examine_backends(found: Diagnosis) -> None:
    from kvq.cli.backend_facts import summarize
    from kvq.registry import available_backends
    from kvq.registry.discovery import OWN_DISTRIBUTION

    infos = available_backends(load=True)
    for info in infos:
        facts = {key: summarize(info)[key] for key in ("name", "state", "reason", "origin", "version")}
        found.backends.append({**facts, "works": _works(info, found)})
        if info.state not in ("ready", "blocked"):
            found.add_error(f"{info.state}: {info.reason}", f"`kvq backends {info.name}` shows the details")
        elif info.state == "ready" and info.reason:
            found.add_warning(f"backend {info.name!r}: {info.reason}", "uninstall the ignored distribution")
    if found.kvq["installed"] and not any(info.origin == OWN_DISTRIBUTION for info in infos):
        found.add_error("kvq's own backends are not registered", REINSTALL)
    elif not any(one["works"] for one in found.backends):
        found.add_error("no backend can be used", "see the states of the backends, and KVQ_PLUGINS, KVQ_BLOCK_PLUGINS")
    _examine_lists(found)


def _works(info: BackendInfo, found: Diagnosis) -> bool:
    """Return whether a backend that is ready quantizes one block and reads it back."""
    from kvq.cli.sample_block import runs_here, try_backend

    if info.spec is None or info.state != "ready":
        return False
    if not runs_here(info.spec):
        choices = ", ".join(info.spec.capabilities.device_types)
        found.add_warning(f"backend {info.name!r} takes states on {choices} only", "use it on such a machine")
        return False
    try:
        try_backend(info.spec)
    except Exception as error:  # noqa: BLE001  # foreign code; what it raises is what there is to tell
        text = str(error) if isinstance(error, KVQError) else f"{type(error).__name__}: {error}"
        found.add_error(f"backend {info.name!r} fails on one block: {text}", "reinstall the library that it names")
        return False
    return True


def _examine_lists(found: Diagnosis) -> None:
    """Warn of names in the allow and deny lists that nothing offers, which are most likely mistyped."""
    known = {one["name"] for one in found.backends}
    for variable, text in found.environment.items():
        if variable not in _LIST_VARIABLES:
            continue
        for name in sorted({part.strip() for part in text.split(",")} - known - {""}):
            found.add_warning(f"{variable} names {name!r}, which no plugin offers", "correct the name or drop it")
