"""Turn errors of pydantic and the registry into kvq's: paths as the user wrote them, one line a fault."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from kvq.errors import BackendError, ConfigError, Fault

_ACCEPTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "string_type": "a string",
}
"""pydantic's types of error in the words of a configuration file."""

_ABSENT = object()
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 80


def shown(value: object) -> str:
    """Return `repr(value)`, cut if it is long."""
    try:
        return _shortener.repr(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        return (
            f"{'a number' if isinstance(value, int) else f'a {type(value).__name__} with one'} of thousands of digits"
        )


def not_accepted(value: object, accepted: str) -> ValueError:
    """Return the error for a value that is not accepted; `accepted` says which values are."""
    return ValueError(f"{shown(value)} is not accepted: {accepted}")


class FaultCollector:
    """Gathers faults, to report all of them at once."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Keep an error raised inside the block as a fault at `path`."""
        try:
            yield
        except ConfigError as error:
            self.faults += [fault.within(*path) for fault in error.faults]
        except BackendError as error:
            self.faults.append(Fault(path, str(error), error))
        except ValueError as error:
            self.faults.append(Fault(path, str(error)))

    def raise_faults(self) -> None:
        """Raise the faults that were gathered, if there are any.

        Raises:
            ConfigError: there are faults; it lists all of them, in the order in which they were found.
        """
        if self.faults:
            raise ConfigError(self.faults)


def as_kvq_error(faults: Sequence[Fault], source: str | None = None) -> ConfigError | BackendError:
    """Return the error that reports `faults`: the backend's own if its absence is the only fault.

    Args:
        faults: at least one.
        source: the file to name, or None.
    """
    causes = [fault.cause for fault in faults]
    first = causes[0]
    if first is None or any(str(cause) != str(first) for cause in causes):
        return ConfigError(faults, source)
    if source is None:
        return first
    located = type(first)(f"{first} (from {source}: {faults[0].location})")
    located.__cause__ = first.__cause__
    return located


def find_faults(error: ValidationError, values: object, fields: Iterable[str]) -> list[Fault]:
    """Return the faults that pydantic found.

    Args:
        error: pydantic's error.
        values: the values that were validated; they tell the user's paths from the names of pydantic's own branches.
        fields: the field names that are known at the top level.
    """
    known = tuple(fields)
    faults: list[Fault] = []
    for item in error.errors(include_url=False):
        path = _written_path(item["loc"], values, is_missing=item["type"] == "missing")
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            faults += [fault.within(*path) for fault in inner.faults]
        elif len(path) < len(item["loc"]):
            _add_branch(faults, Fault(path, _problem(item, known)))
        else:
            faults.append(Fault(path, _problem(item, known)))
    return faults


def _written_path(loc: tuple[str | int, ...], values: object, *, is_missing: bool) -> tuple[str | int, ...]:
    # Between the steps that a user wrote, pydantic puts the names of the branches of a union that it tried. The first
    # step is always a field's name, the last one of a missing field is not in `values` either.
    path: list[str | int] = []
    for position, step in enumerate(loc):
        inner = _find_item(values, step)
        if inner is not _ABSENT:
            values = inner
        elif position > 0 and not (is_missing and position == len(loc) - 1):
            continue
        path.append(step)
    return tuple(path)


def _find_item(values: object, step: str | int) -> object:
    if isinstance(values, Mapping):
        # A validator may have turned a key into text, as `layers` does with an index.
        return next((item for key, item in values.items() if str(key) == str(step)), _ABSENT)
    is_index = isinstance(values, (list, tuple)) and isinstance(step, int) and step < len(values)
    return values[step] if is_index else _ABSENT  # type: ignore[index]  # checked in the line above


def _add_branch(faults: list[Fault], fault: Fault) -> None:
    # Every branch of a union in a backend's options has a fault of its own at the same path.
    for position, known in enumerate(faults):
        if known.path == fault.path:
            faults[position] = replace(known, problem=f"{known.problem}; or: {fault.problem}")
            return
    faults.append(fault)


def _problem(item: Mapping[str, Any], fields: Sequence[str]) -> str:
    inner = item.get("ctx", {}).get("error")
    if item["type"] == "extra_forbidden":
        return _unknown_field(str(item["loc"][-1]), fields if len(item["loc"]) == 1 else ())
    if item["type"] == "missing":
        return "is missing; give it a value"
    return str(inner or not_accepted(item["input"], _accepted(item)))


def _accepted(item: Mapping[str, Any]) -> str:
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    text = str(item["msg"]).removeprefix("Input should be ")
    return _ACCEPTED.get(item["type"], text)


def _unknown_field(name: str, fields: Sequence[str]) -> str:
    near = [field for field in fields if field.startswith(f"{name}_")] or difflib.get_close_matches(name, fields, n=2)
    if near:
        return f"is unknown; did you mean {' or '.join(map(repr, near))}?"
    return f"is unknown; known: {', '.join(fields)}" if fields else "is unknown; take it out"
