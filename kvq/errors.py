"""The error tree of kvq; every error that kvq raises on purpose is in it.

    KVQError
    ├── ConfigError (ValueError)             a configuration is wrong; `.faults` lists every reason
    ├── BackendError                         a backend is unavailable
    │   ├── UnknownBackendError (LookupError)
    │   ├── BlockedBackendError (LookupError)
    │   ├── BackendConflictError (LookupError)
    │   ├── BrokenBackendError (ImportError)
    │   ├── MissingRequirementError (ImportError)
    │   └── BackendFailedError (RuntimeError)    its own code raised an error
    ├── QuantizerContractError (TypeError)   a quantizer returned something outside its contract
    ├── StatesError (ValueError)             states handed to `update` do not fit the cache
    ├── ModelError (ValueError)              a model that this cache cannot serve
    ├── EvaluationError (ValueError)         a measurement that cannot be made, or not as it was asked for
    ├── MissingExtraError (ImportError)      a part of kvq needs an extra that is not installed
    ├── CacheFileError (ValueError)          a file that is not a cache, or not the one that was asked for
    ├── CalibrationError (ValueError)        statistics of a model that cannot be used, or a file of something else
    ├── ContractViolationError (AssertionError)  a backend fails a check of `kvq.testing`
    ├── CheckNotApplicableError (LookupError)    a check of `kvq.testing` does not apply to this backend
    └── CacheStateError (RuntimeError)       an operation that the cache cannot do in its present state

Each class is also the built-in that a caller would expect: catch either. None is a `KeyError`, which prints its message
quoted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_MESSAGE_LENGTH = 2000
MAX_MESSAGE_LINES = 24
MAX_PART_LENGTH = 600
"""Most characters of a fault's place, of its problem, and of a file's name, for several of them to fit on a screen."""
MAX_STEP_LENGTH = 80
"""Most characters of one key in a fault's path."""


def shorten(text: str, length: int = MAX_MESSAGE_LENGTH, lines: int = MAX_MESSAGE_LINES) -> str:
    """Return a text that fits on a screen: a longer one is cut, and says how much was left out."""
    rows = text.split("\n")
    if len(rows) > lines:
        text = "\n".join([*rows[: lines - 1], f"... {len(rows) - lines + 1:,} more lines"])
    if len(text) <= length:
        return text
    end = " ... {:,} more characters"
    kept = length - len(end) - 8
    return text[:kept] + end.format(len(text) - kept)


class KVQError(Exception):
    """Root of all errors that kvq raises on purpose.

    A message may quote text of any length: `str` of an error is cut to fit on a screen, `args` hold all of it.
    """

    def __str__(self) -> str:
        return shorten(super().__str__())


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration.

    Attributes:
        path: the keys that lead to it, outermost first, e.g. `("layers", "0-3", "nbits_k")`.
        problem: the value given, the values accepted and what to do, in one line.
        cause: the backend's own error, if that is the reason.
    """

    path: tuple[str | int, ...]
    problem: str
    cause: BackendError | None = None

    def within(self, *prefix: str | int) -> Fault:
        """Return this fault with `prefix` put before its path."""
        return replace(self, path=(*prefix, *self.path))

    @property
    def location(self) -> str:
        """The path as a person writes it, e.g. `layers['0-3'].nbits_k`."""
        text = ""
        for step in self.path:
            if isinstance(step, str) and len(step) <= MAX_STEP_LENGTH and step.isidentifier():
                text += f".{step}" if text else step
            else:
                text += f"[{shorten(repr(step), MAX_STEP_LENGTH)}]"
        return text or "configuration"

    def __str__(self) -> str:
        return f"{shorten(self.location, MAX_PART_LENGTH)}: {shorten(self.problem, MAX_PART_LENGTH)}"


class ConfigError(KVQError, ValueError):
    """A configuration is wrong.

    Attributes:
        faults: every fault found, in the order of the fields.
        source: the file that the configuration came from, or None.
    """

    def __init__(self, faults: Iterable[Fault], source: str | None = None) -> None:
        self.faults = tuple(faults)
        self.source = source
        place = shorten(source, MAX_PART_LENGTH) if source else ""
        origin = f" in {place}" if place else ""
        if len(self.faults) == 1:
            message = f"{self.faults[0]}{f' (from {place})' if place else ''}"
        else:
            lines = "".join(f"\n  - {fault}" for fault in self.faults)
            message = f"{len(self.faults)} faults{origin}:{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...], str | None]]:
        return type(self), (self.faults, self.source)


class BackendError(KVQError):
    """A backend is unavailable; the subclasses say why."""


class UnknownBackendError(BackendError, LookupError):
    """No installed distribution offers a backend of that name."""


class BlockedBackendError(BackendError, LookupError):
    """The backend is installed, but `KVQ_PLUGINS` or `KVQ_BLOCK_PLUGINS` blocks it."""


class BackendConflictError(BackendError, LookupError):
    """More than one owner claims the name."""


class BrokenBackendError(BackendError, ImportError):
    """The plugin failed to import, or did not return a valid `BackendSpec`."""


class MissingRequirementError(BackendError, ImportError):
    """A distribution that the backend requires is absent or too old."""


class BackendFailedError(BackendError, RuntimeError):
    """The backend's own code raised; the message says in which operation, for which layer and side."""


class QuantizerContractError(KVQError, TypeError):
    """A quantizer returned something outside its contract."""


class StatesError(KVQError, ValueError):
    """States handed to the cache do not fit what it holds."""


class ModelError(KVQError, ValueError):
    """A model, or its configuration, that the cache cannot serve."""


class EvaluationError(KVQError, ValueError):
    """A measurement cannot be made as it was asked for, e.g. there is no such text, model or gate."""


class MissingExtraError(KVQError, ImportError):
    """A part of kvq needs an extra, such as `eval`, that is not installed."""


class CacheFileError(KVQError, ValueError):
    """A cache's file cannot be written, or is refused; the message says why."""


class CalibrationError(KVQError, ValueError):
    """Statistics of a model cannot be read, written or collected, or are of another model."""


class ContractViolationError(KVQError, AssertionError):
    """A backend does not do what the contract says; raised by the checks of `kvq.testing`."""


class CheckNotApplicableError(KVQError, LookupError):
    """A check does not apply: the device is not here, or the backend lacks the capability."""


class CacheStateError(KVQError, RuntimeError):
    """The cache cannot do this operation in its present state."""
