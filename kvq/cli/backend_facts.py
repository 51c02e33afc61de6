"""Facts about backends, as plain values that both the tables and the JSON are made from.

Heavy: it imports torch, and the vendor's library of a backend that is asked for by name.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from kvq.cli.console import one_line
from kvq.cli.requirement_state import describe_requirements
from kvq.cli.sample_block import HEAD_DIM, measure_effective_bits, plain_settings, proposed_group_sizes, runs_here
from kvq.errors import BackendError, UnknownBackendError
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.registry import BackendInfo, available_backends, get_registry


def collect_backends() -> list[dict[str, Any]]:
    """Return the short form of every backend; it imports each plugin, but no vendor's library."""
    with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints must not end up in the JSON
        return [summarize(info) for info in available_backends(load=True)]


def collect_backend(name: str) -> dict[str, Any]:
    """Return the long form of one backend.

    Raises:
        UnknownBackendError: there is none of that name.
    """
    with contextlib.redirect_stdout(sys.stderr):
        info = find_info(name)
        facts = summarize(info)
        if info.spec is not None:
            facts |= describe_spec(info.spec)
            is_ready = info.state == "ready"
            facts["effective_bits"] = _effective_bits(info.spec) if is_ready else []
            from kvq.cli.reader_facts import list_readers  # imports transformers, which `kvq doctor` may find broken

            facts["readers"] = list_readers(info.spec) if is_ready and runs_here(info.spec) else []
        return facts


def find_info(name: str) -> BackendInfo:
    """Return the state of one backend after an attempt to load it, and it alone.

    Raises:
        UnknownBackendError: there is none of that name.
    """
    try:
        get_registry().get_backend(name)
    except UnknownBackendError:
        raise
    except BackendError:
        pass  # its state tells
    return next(info for info in available_backends() if info.name == name)


def summarize(info: BackendInfo) -> dict[str, Any]:
    """Return the short form; values from the spec are None or empty if there is no spec."""
    spec = info.spec
    return {
        "name": info.name,
        "state": info.state,
        "reason": info.reason,
        "origin": info.origin,
        "version": info.version,
        "summary": spec.summary if spec else "",
        "url": spec.url if spec else "",
        "nbits": list(spec.capabilities.nbits) if spec else None,
        "granularities": [str(word) for word in spec.capabilities.granularities] if spec else None,
    }


def describe_spec(spec: BackendSpec) -> dict[str, Any]:
    """Return the facts that the long form adds."""
    return {
        "device_types": list(spec.capabilities.device_types),
        "states_dtypes": list(spec.capabilities.states_dtypes),
        "axis_names": {str(axis): str(word) for axis, word in spec.axis_names.items()},
        "requirements": describe_requirements(spec.requires),
        "options": [_describe_option(name, field) for name, field in spec.options.model_fields.items()],
        "head_dim": HEAD_DIM,
        "group_size": _group_size(spec),
        "uses_group_size": spec.uses_group_size,
        "calibration": spec.calibration,
        "defaults": to_jsonable_python(dict(spec.defaults)),
    }


def _group_size(spec: BackendSpec) -> int | dict[str, int] | None:
    """Return the group size where a user sets none, one each if the sides differ; None if the backend ignores it."""
    sizes = proposed_group_sizes(spec)
    if not spec.uses_group_size:
        return None
    return sizes["key"] if sizes["key"] == sizes["value"] else sizes


def _describe_option(name: str, field: FieldInfo) -> dict[str, Any]:
    kind = field.annotation
    return {
        "name": name,
        "type": kind.__name__ if type(kind) is type else str(kind).replace("typing.", ""),
        "required": field.is_required(),
        "default": None
        if field.is_required()
        else to_jsonable_python(field.get_default(call_default_factory=True), fallback=str),
        "description": field.description or "",
    }


def _effective_bits(spec: BackendSpec) -> list[dict[str, Any]]:
    accepted = spec.capabilities
    return [_measure(spec, nbits, word) for nbits in accepted.nbits for word in accepted.granularities]


def _measure(spec: BackendSpec, nbits: float, granularity: Granularity) -> dict[str, Any]:
    row: dict[str, Any] = {"nbits": nbits, "granularity": str(granularity), "key": None, "value": None, "reason": ""}
    try:
        settings = plain_settings(spec, nbits, granularity)
        row["key"] = measure_effective_bits(settings, "key")
        row["value"] = measure_effective_bits(settings, "value")
    except Exception as error:  # noqa: BLE001  # foreign code; what it raises is the answer for this row
        row["reason"] = one_line(f"{type(error).__name__}: {error}")
    return row
