"""Validate a `BackendSpec` before anything else reads it.

A dataclass checks none of its values, and a spec comes from foreign code: every field is checked here, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from packaging.requirements import InvalidRequirement, Requirement

from kvq.errors import BrokenBackendError
from kvq.plugin_api.backend_spec import API_VERSION, CALIBRATION_WORDS, BackendOptions, BackendSpec, Capabilities
from kvq.plugin_api.granularity import Granularity
from kvq.registry.default_faults import find_default_faults


def check_spec(spec: object, name: str, origin: str) -> BackendSpec:
    """Return `spec` if it is valid.

    Args:
        spec: the object that a plugin returned or a user gave.
        name: the name that it must have.
        origin: its source, for the error.

    Raises:
        BrokenBackendError: it is not a valid spec of that name; the message lists every reason.
    """
    if not isinstance(spec, BackendSpec):
        reasons = [f"a BackendSpec is needed, got {type(spec).__name__}"]
    elif spec.api_version != API_VERSION:
        # The fields may have another meaning in that API: checking the rest would mislead.
        reasons = [
            f"it was written for plugin API {spec.api_version!r}, this kvq has {API_VERSION}; install a release for it"
        ]
    else:
        reasons = list(_find_faults(spec, name))
    if reasons or not isinstance(spec, BackendSpec):
        raise BrokenBackendError(f"backend {name!r} from {origin} is not valid: {'; '.join(reasons)}")
    return spec


def _find_faults(spec: BackendSpec, name: str) -> Iterator[str]:
    if spec.name != name:
        yield f"it calls itself {spec.name!r}; give entry point and spec the same name"
    if not isinstance(spec.name, str) or not spec.name.replace("-", "_").isidentifier():
        yield f"the name {spec.name!r} is not made of letters, digits, '_' and '-'"
    if not (isinstance(spec.options, type) and issubclass(spec.options, BackendOptions)):
        yield f"options={spec.options!r} is not a subclass of BackendOptions"
    elif spec.options.model_config.get("extra") != "forbid" or not spec.options.model_config.get("frozen"):
        yield f"{spec.options.__name__} is not frozen or accepts unknown keys; keep the model_config of BackendOptions"
    if not callable(spec.build):
        yield f"build={spec.build!r} is not callable"
    yield from _find_capability_faults(spec.capabilities)
    if not isinstance(spec.axis_names, Mapping) or not all(
        isinstance(axis, int) and isinstance(meaning, Granularity) for axis, meaning in spec.axis_names.items()
    ):
        yield f"axis_names={spec.axis_names!r} does not map integers to Granularity"
    for field in ("summary", "url"):
        if not isinstance(getattr(spec, field), str):
            yield f"{field}={getattr(spec, field)!r} is not a string"
    yield from _find_requirement_faults(spec.requires)
    if not isinstance(spec.uses_group_size, bool):
        yield f"uses_group_size={spec.uses_group_size!r} is not True or False"
    if spec.calibration not in CALIBRATION_WORDS:
        yield f"calibration={spec.calibration!r} is none of {', '.join(CALIBRATION_WORDS)}"
    yield from find_default_faults(spec)


def _find_capability_faults(capabilities: object) -> Iterator[str]:
    if not isinstance(capabilities, Capabilities):
        yield f"capabilities={capabilities!r} is not a Capabilities"
        return
    if not _is_tuple_of(capabilities.nbits, (int, float)) or not capabilities.nbits:
        yield f"capabilities.nbits={capabilities.nbits!r} is not a tuple of at least one number"
    elif any(isinstance(bits, bool) or not 0 < bits < math.inf for bits in capabilities.nbits):
        yield f"capabilities.nbits={capabilities.nbits!r} holds something that is not a number of bits"
    if not _is_tuple_of(capabilities.granularities, Granularity) or not capabilities.granularities:
        yield f"capabilities.granularities={capabilities.granularities!r} is not a tuple of at least one Granularity"
    for field in ("device_types", "states_dtypes"):
        if not _is_tuple_of(getattr(capabilities, field), str):
            yield f"capabilities.{field}={getattr(capabilities, field)!r} is not a tuple of strings"


def _find_requirement_faults(requires: object) -> Iterator[str]:
    if not isinstance(requires, tuple) or not _is_tuple_of(requires, str):
        yield f"requires={requires!r} is not a tuple of strings"
        return
    for text in requires:
        try:
            Requirement(text)
        except InvalidRequirement as error:
            yield f"requirement {text!r} cannot be parsed: {' '.join(str(error).split())}"


def _is_tuple_of(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kinds) for item in value)
