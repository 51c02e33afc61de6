"""Options that a configuration gives to backends: checked by their own models, kept as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from kvq.config.backend_choice import find_given_spec
from kvq.config.faults import FaultCollector, find_faults, not_accepted
from kvq.config.frozen import FrozenDict, freeze
from kvq.errors import ConfigError
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.registry import get_registry

MAX_DEPTH = 16
"""How deep mappings and lists may be nested; YAML can even express one that holds itself."""


def resolve_options(
    options: Mapping[str, Mapping[str, Any]], choices: Iterable[Any]
) -> FrozenDict[str, Mapping[str, Any]]:
    """Check options by backend name, and return them as values that YAML and JSON can hold.

    Args:
        options: options by backend name.
        choices: the backends that the configuration chooses; one given as an object is found among them.

    Raises:
        ConfigError: options are wrong; it lists every fault of every backend's options.
    """
    choices = tuple(choices)
    faults = FaultCollector()
    resolved: dict[str, Mapping[str, Any]] = {}
    for name, given in options.items():
        with faults.at(name):
            specs = (find_given_spec(choice, name) for choice in choices)
            backend = next((spec for spec in specs if spec is not None), None) or get_registry().get_backend(name)
            resolved[name] = _resolve_one(backend, given)
    faults.raise_faults()
    return FrozenDict(resolved)


def _resolve_one(backend: BackendSpec, options: Mapping[str, Any]) -> Mapping[str, Any]:
    faults = FaultCollector()
    for path, value in _walk(options, ()):
        if isinstance(value, float) and not math.isfinite(value):
            with faults.at(*path):
                raise not_accepted(value, "a finite number")
    faults.raise_faults()
    try:
        built = backend.build_options(options)
        plain: Mapping[str, Any] = freeze(built.model_dump(mode="json", exclude_unset=True))
        restored = backend.build_options(plain)
    except ValidationError as error:
        raise ConfigError(find_faults(error, options, backend.options.model_fields)) from error
    if restored != built:
        raise ValueError(f"backend {backend.name!r} reads its options differently once they are written out; report it")
    return plain


def _walk(value: object, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], object]]:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"mappings and lists lie more than {MAX_DEPTH} deep; flatten them")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
    else:
        yield path, value
