"""The backend that a configuration chooses: a name or a `BackendSpec`, for both sides or one each.

Owns how a choice is read, looked up and written out. The limits of the chosen backend are in
`kvq.config.backend_limits`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from kvq.config.faults import FaultCollector, not_accepted
from kvq.config.field_types import SIDES, KeyValue, of_side, parse_sides, sides_schema
from kvq.errors import BackendError, ConfigError, Fault
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.quantizer import Side
from kvq.registry import get_registry
from kvq.registry.spec_validation import check_spec


def get_side_backend(choice: Any, side: Side) -> BackendSpec:
    """Return the backend that is chosen for one side.

    Raises:
        BackendError: the backend is unavailable.
    """
    own = of_side(choice, side)
    return own if isinstance(own, BackendSpec) else get_registry().get_backend(own)


def check_backends(choice: Any) -> None:
    """Check that the backends chosen for both sides are available.

    Raises:
        ConfigError: one is not; the backend's own error is the cause of the fault.
    """
    faults = FaultCollector()
    for side in SIDES if isinstance(choice, KeyValue) else SIDES[:1]:
        with faults.at(*([side] if isinstance(choice, KeyValue) else [])):
            get_side_backend(choice, side)
    faults.raise_faults()


def find_given_spec(choice: Any, name: str) -> BackendSpec | None:
    """Return the `BackendSpec` called `name` that was given as an object, or None."""
    given = (of_side(choice, side) for side in SIDES)
    return next((spec for spec in given if isinstance(spec, BackendSpec) and spec.name == name), None)


def check_writable(choice: Any) -> None:
    """Check that the choice can be written to a file: every backend is registered under its name.

    Raises:
        ConfigError: a `BackendSpec` was given that the registry does not know, or knows as another one.
    """
    for side in SIDES:
        spec = of_side(choice, side)
        if isinstance(spec, BackendSpec) and not _is_registered(spec):
            problem = (
                f"{spec.name!r} was given as an object, which no file can hold; call register_backend with it first"
            )
            raise ConfigError([Fault((), problem)])


def _is_registered(spec: BackendSpec) -> bool:
    try:
        return get_registry().get_backend(spec.name) == spec
    except BackendError:
        return False


def _parse_choice(value: object) -> str | BackendSpec | KeyValue:
    return parse_sides(value, _parse_one_choice, "the name of a backend, a BackendSpec")


def _parse_one_choice(value: object, accepted: str) -> str | BackendSpec:
    if isinstance(value, BackendSpec):
        try:
            check_spec(value, value.name, "the object given")
        except BackendError as error:
            raise ConfigError([Fault((), str(error), error)]) from error
        # A registered backend becomes its name: two configurations that choose it by name and by object are equal.
        return value.name if _is_registered(value) else value
    if not isinstance(value, str) or not value:
        raise not_accepted(value, accepted)
    return value


def _dump_choice(choice: Any) -> str | dict[str, str] | None:
    if isinstance(choice, KeyValue):
        return {"key": _name(choice.key), "value": _name(choice.value)}
    return None if choice is None else _name(choice)


def _name(choice: str | BackendSpec) -> str:
    return choice.name if isinstance(choice, BackendSpec) else choice


BackendChoice = Annotated[
    str | BackendSpec | KeyValue,
    PlainValidator(_parse_choice),
    PlainSerializer(_dump_choice),
    sides_schema({"type": "string"}),
]
