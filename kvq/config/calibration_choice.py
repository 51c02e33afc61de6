"""The calibration that a configuration names: a file, with or without the digest that it must have.

Owns how it is read and written out. What it is for is the backend's affair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from kvq.calibration import Calibration
from kvq.calibration.calibration import STANDARD, StandardCalibration
from kvq.config.faults import not_accepted
from kvq.errors import ConfigError, Fault
from kvq.plugin_api.backend_spec import BackendSpec

FIELD = "calibration"
REQUIRED, UNUSED = "required", "unused"
_FILE, _DIGEST = "file", "digest"
_ACCEPTED = f"the path of a file that `kvq calibrate` wrote, {{file: ..., digest: ...}}, or {STANDARD!r}"
_MOST_REMEMBERED = 8


def place_beside(values: Mapping[Any, Any], config_file: str | Path) -> Mapping[Any, Any]:
    """Return fields that a configuration file holds, with a relative path of a calibration led from its folder."""
    given = values.get(FIELD)
    if isinstance(given, str) and given != STANDARD:
        return {**values, FIELD: _placed(given, config_file)}
    if isinstance(given, Mapping) and isinstance(given.get(_FILE), str):
        return {**values, FIELD: {**given, _FILE: _placed(given[_FILE], config_file)}}
    return values


def check_needed(calibration: Calibration | None, backends: Iterable[BackendSpec]) -> None:
    """Check that backends that cannot do without statistics get some.

    Raises:
        ValueError: there are none.
    """
    needing = next((spec.name for spec in backends if spec.calibration == REQUIRED), None)
    if needing is not None and calibration is None:
        raise ValueError(
            f"backend {needing!r} needs statistics of the model: write them to a file by `kvq calibrate --model ... "
            f"--out FILE`, and give its path; or try {STANDARD!r}, which knows nothing of the model"
        )


def check_named(calibration: Calibration | None) -> None:
    """Check that a configuration can be written to a file.

    Raises:
        ConfigError: the calibration is in no file.
    """
    if calibration is not None and calibration.path is None and not isinstance(calibration, StandardCalibration):
        problem = (
            "it was given as an object, which no configuration file can hold; save it first, calibration.save(...)"
        )
        raise ConfigError([Fault((FIELD,), problem)])


def move_calibration(fields: Mapping[str, Any], calibration: Calibration | str | Path | None) -> Mapping[str, Any]:
    """Return the fields of a configuration with its calibration at another place; it must be the same one.

    Args:
        fields: as `to_dict` returns them.
        calibration: where it is now, or None: where it was.

    Raises:
        ConfigError: the configuration has none.
    """
    if calibration is None:
        return fields
    given = fields.get(FIELD)
    if not isinstance(given, Mapping):
        raise ConfigError([Fault((FIELD,), "one is given, and the configuration in the file has none; leave it out")])
    return {**fields, FIELD: {**given, _FILE: calibration}}


def _parse(value: object) -> Calibration:
    if isinstance(value, Mapping) and set(value) == {_FILE, _DIGEST} and isinstance(value[_DIGEST], str):
        found = _open(value[_FILE])
        if found.digest != value[_DIGEST]:
            raise ValueError(
                f"{found} has the digest {found.digest}, and {value[_DIGEST]} was written down: another one"
            )
        return found
    return _open(value)


def _open(value: object) -> Calibration:
    if isinstance(value, Calibration):
        return value
    if value == STANDARD:
        return StandardCalibration()
    if not isinstance(value, (str, Path)) or not str(value):
        raise not_accepted(value, _ACCEPTED)
    path = Path(value).expanduser()
    try:
        state = os.stat(path)  # noqa: PTH116  # its numbers alone
    except (OSError, ValueError):
        return Calibration.load(path)  # whose error says why
    return _load(str(path.absolute()), state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=_MOST_REMEMBERED)
def _load(path: str, *state: int) -> Calibration:
    del state  # a file that was written again is another one
    return Calibration.load(path)


def _dump(value: Calibration | None) -> dict[str, str] | str | None:
    if value is None or isinstance(value, StandardCalibration):
        return None if value is None else STANDARD
    return {_FILE: str(value.path), _DIGEST: value.digest}


def _placed(path: str, config_file: str | Path) -> str:
    own = Path(path).expanduser()
    return str(own if own.is_absolute() else Path(config_file).expanduser().parent / own)


_FILE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {_FILE: {"type": "string"}, _DIGEST: {"type": "string"}},
    "required": [_FILE, _DIGEST],
}
GivenCalibration = Annotated[
    Calibration,
    PlainValidator(_parse),
    PlainSerializer(_dump),
    WithJsonSchema({"anyOf": [{"type": "string"}, _FILE_SCHEMA]}),
]
