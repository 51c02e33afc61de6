"""Configurations with a name: the fields that each preset stands for.

A preset is gone once a configuration is built: only the fields stay. So what was written or saved keeps its meaning
when a later version of kvq changes the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvq.config.faults import not_accepted
from kvq.config.frozen import FrozenDict
from kvq.errors import ConfigError, Fault

FIELD = "preset"
"""The key that names a preset, beside the fields of a configuration."""
DESCRIPTION = "name of a preset, which gives the fields that are not set beside it; `kvq presets` lists them"

PRESET_BACKEND = "native"
"""The backend of all presets."""


def _evened_out(nbits: int, metadata_dtype: str | None = None) -> FrozenDict[str, Any]:
    return FrozenDict(
        backend=PRESET_BACKEND,
        nbits_k=nbits,
        nbits_v=nbits,
        axis_key="per_channel",
        axis_value="per_channel",
        q_group_size=64,
        rotation_k="hadamard",
        rotation_v="hadamard",
        balance_k="rms",
        balance_v="rms",
        clip_k="auto",
        clip_v="auto",
        metadata_dtype=metadata_dtype,
    )


PRESETS: Mapping[str, Mapping[str, Any]] = FrozenDict(
    {
        "8bit": _evened_out(8),
        # Of keys with a bias, middles in bytes are too coarse for steps as fine as these.
        "4bit": _evened_out(4),
        "3bit": _evened_out(3, "int8"),
        "2bit": _evened_out(2, "int8"),
    }
)
"""Name to fields, as a user would write them. All other fields have the defaults of the configuration."""

_LOOSE_K = FrozenDict(rotation_k="auto", balance_k="auto", metadata_dtype=None)
_LOOSE_V = FrozenDict(rotation_v="auto", balance_v="auto", metadata_dtype=None)
_DEPENDENT: Mapping[str, Mapping[str, Any]] = FrozenDict(
    axis_key=_LOOSE_K,
    axis_value=_LOOSE_V,
    backend=FrozenDict(dict.fromkeys(("rotation_k", "rotation_v", "balance_k", "balance_v"), "auto")),
    layers={**_LOOSE_K, **_LOOSE_V},
)
"""What a preset says no longer beside a field with which it might not go together, and what holds instead.

In groups inside a token, bytes for scales would be lost on all tokens of a block but the largest ones.
"""


def expand_preset(fields: Mapping[str, Any], source: str | None = None) -> Mapping[str, Any]:
    """Return fields with the preset among them, if there is one, replaced by what it stands for.

    Args:
        fields: fields of a configuration; those beside the preset win over it.
        source: the file to name in the error.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if FIELD not in fields:
        return fields
    name = fields[FIELD]
    if not isinstance(name, str) or name not in PRESETS:
        problem = str(not_accepted(name, f"a preset is one of {', '.join(map(repr, PRESETS))}"))
        raise ConfigError([Fault((FIELD,), problem)], source)
    given = {field: value for field, value in fields.items() if field != FIELD}
    loosened = {name: value for field, loose in _DEPENDENT.items() if field in given for name, value in loose.items()}
    return {**PRESETS[name], **loosened, **given}


def add_to_schema(schema: dict[str, Any]) -> None:
    """Put the preset before the fields in the JSON schema of a configuration."""
    preset = {"description": DESCRIPTION, "enum": list(PRESETS), "title": "Preset"}
    schema["properties"] = {FIELD: preset, **schema["properties"]}
