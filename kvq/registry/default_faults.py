"""Faults of what a backend proposes for the fields of a configuration.

A user who sets nothing gets these values, so a wrong one is told as a fault of the backend, not of the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvq.plugin_api.backend_spec import DEFAULT_FIELDS, BackendSpec, Capabilities
from kvq.plugin_api.granularity import Granularity

GROUP_MULTIPLE = 8
"""A proposed group size serves both directions, and along tokens eight codes at the lowest width fill one byte."""
_STEPS = {"rotation": ("auto", "none", "hadamard"), "balance": ("auto", "none", "rms"), "clip": ("auto", "none")}


def find_default_faults(spec: BackendSpec) -> Iterator[str]:
    """Yield what is wrong with `spec.defaults`, a line each."""
    if not isinstance(spec.defaults, Mapping):
        yield f"defaults={spec.defaults!r} is not a mapping"
        return
    for name, value in spec.defaults.items():
        fault = _find_fault(name, value, spec)
        if fault is not None:
            yield f"defaults has {name}={value!r}, {fault}"
    for side in ("key", "value"):
        balance = spec.defaults.get(f"balance_{side[0]}")
        if balance == "rms" and spec.defaults.get(f"axis_{side}") == Granularity.PER_TOKEN:
            yield f"defaults has balance_{side[0]}='rms', which does not fit axis_{side}='per_token'"


def _find_fault(name: object, value: object, spec: BackendSpec) -> str | None:
    """Return what is wrong with one default, or None."""
    if name not in DEFAULT_FIELDS:
        return f"which is none of {', '.join(DEFAULT_FIELDS)}"
    field = str(name)
    if field == "q_group_size":
        return _find_size_fault(value, spec)
    if not isinstance(spec.capabilities, Capabilities):
        return None
    kind = field.partition("_")[0]
    if kind == "clip" and isinstance(value, float):
        return None if 0 < value < 1 else "which is not between 0 and 1"
    offered = {"nbits": spec.capabilities.nbits, "axis": spec.capabilities.granularities, **_STEPS}[kind]
    if isinstance(value, bool) or value not in tuple(offered):
        return f"which is none of {', '.join(map(str, offered))}"
    return None


def _find_size_fault(value: object, spec: BackendSpec) -> str | None:
    if not spec.uses_group_size:
        return "but uses_group_size is False"
    sizes = list(value.values()) if isinstance(value, Mapping) and set(value) == {"key", "value"} else [value]
    if any(type(size) is not int or size < GROUP_MULTIPLE or size % GROUP_MULTIPLE for size in sizes):
        return f"which is no multiple of {GROUP_MULTIPLE}, nor one each under 'key' and 'value'"
    return None
