"""What a backend proposes for the fields that nobody has set.

A proposal is gone once a configuration is built: only the fields stay, and all of them are written out. So a file keeps
its meaning when a later version of the backend proposes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvq.config.backend_choice import get_side_backend
from kvq.config.field_types import SIDES, of_side
from kvq.config.layer_config import AXIS_FIELDS, BALANCE_FIELDS, CLIP_FIELDS, NBITS_FIELDS, ROTATION_FIELDS
from kvq.errors import KVQError
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.quantizer import Side
from kvq.registry.spec_validation import check_spec

GROUP_SIZE_FIELD = "q_group_size"


def fill_in_defaults(fields: Mapping[str, Any], *, backend: str, group_size: int) -> Mapping[str, Any]:
    """Return fields with those that are missing as the chosen backend proposes them, where it does.

    A step before quantizing (rotation, balance, clip) is not taken over beside an axis or `layers` that were set: it
    might not go together with them.

    Args:
        fields: the fields that were set.
        backend: the backend where none was set.
        group_size: the group size of a side whose backend proposes none, if that of the other side does.
    """
    proposed: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for side in SIDES:
        spec = _find_backend(fields.get("backend", backend), side)
        if spec is None:
            continue
        for name in (NBITS_FIELDS[side], AXIS_FIELDS[side], *_steps(side, fields)):
            if name in spec.defaults:
                proposed[name] = spec.defaults[name]
        if GROUP_SIZE_FIELD in spec.defaults:
            sizes[side] = find_group_size(spec, side, group_size)
    if sizes:
        proposed[GROUP_SIZE_FIELD] = dict.fromkeys(SIDES, group_size) | sizes
    return {**proposed, **fields}


def find_group_size(spec: BackendSpec, side: Side, otherwise: int) -> int:
    """Return the group size that a backend proposes for a side, or another one if it proposes none."""
    size = spec.defaults.get(GROUP_SIZE_FIELD, otherwise)
    return int(size[side] if isinstance(size, Mapping) else size)


def _steps(side: Side, fields: Mapping[str, Any]) -> tuple[str, ...]:
    is_bound = AXIS_FIELDS[side] in fields or "layers" in fields
    return () if is_bound else (ROTATION_FIELDS[side], BALANCE_FIELDS[side], CLIP_FIELDS[side])


def _find_backend(choice: Any, side: Side) -> BackendSpec | None:
    """Return the backend of a side, or None if the choice is faulty, which is told when the field is checked."""
    own = choice.get(side) if isinstance(choice, Mapping) else of_side(choice, side)
    if isinstance(own, (str, BackendSpec)):
        try:
            found = get_side_backend(own, side)
            return check_spec(found, found.name, "the object given")
        except KVQError:
            return None
    return None
