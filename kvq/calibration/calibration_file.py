"""The file of a calibration: safetensors with a checksum, a header in JSON, four or five tensors for each side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq.errors import CacheFileError, CalibrationError
from kvq.files.atomic import find_other_kind, written_atomically
from kvq.files.container import ContainerReader, SavedTensor, TensorSpec, write_container
from kvq.files.model_fingerprint import ModelFingerprint
from kvq.plugin_api.quantizer import Side
from kvq.plugin_api.statistics import LayerStatistics

FORMAT_NAME = "kvq.calibration"
FORMAT_VERSION = 1
_HEADER = "calibration"
_OPTIONAL = "query_moment"
_NAMES = tuple(field.name for field in fields(LayerStatistics))
_MATRICES = ("second_moment", _OPTIONAL)


class CalibrationHeader(BaseModel):
    """All that a file says beside the numbers themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kvq_version: str
    model: ModelFingerprint | None
    text: str
    tokens: int = Field(ge=0)


@dataclass(frozen=True)
class CalibrationContent:
    """What a file holds."""

    layers: dict[tuple[int, Side], LayerStatistics]
    model: ModelFingerprint | None
    text: str
    tokens: int


def write_calibration(
    path: Path,
    layers: Mapping[tuple[int, Side], LayerStatistics],
    *,
    model: ModelFingerprint | None,
    text: str,
    tokens: int,
) -> None:
    """Write statistics to a file; an existing one is replaced.

    Raises:
        CalibrationError: the file cannot be written; an existing one is unchanged.
    """
    header = CalibrationHeader(kvq_version=metadata.version("kvq"), model=model, text=text, tokens=tokens)
    tensors = {
        f"layers.{layer_idx}.{side}.{name}": SavedTensor.of(tensor)
        for (layer_idx, side), own in layers.items()
        for name in _NAMES
        if (tensor := getattr(own, name)) is not None
    }
    facts = {"format": FORMAT_NAME, "format_version": str(FORMAT_VERSION), _HEADER: header.model_dump_json()}
    try:
        with written_atomically(path) as file:
            write_container(file, facts, tensors)
    except OSError as error:
        raise CalibrationError(f"calibration {str(path)!r} cannot be written: {error.strerror or error}") from error


def read_calibration(path: Path) -> CalibrationContent:
    """Return what a file holds; it is checked first, every byte of it.

    Raises:
        CalibrationError: the file cannot be read, is damaged, or is something else.
    """
    try:
        other = find_other_kind(path)
        if other is not None:  # a pipe would be waited for
            raise CacheFileError(f"it is {other}, and no file")
        with path.open("rb", buffering=0) as file:
            return _read(ContainerReader(file))
    except (CacheFileError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(
            f"calibration {str(path)!r} cannot be read: {reason}; `kvq calibrate` writes one"
        ) from error


def _read(container: ContainerReader) -> CalibrationContent:
    found = container.metadata
    if found.get("format") != FORMAT_NAME:
        raise CacheFileError("it is a safetensors file, but of something else than a calibration of kvq")
    if found.get("format_version") != str(FORMAT_VERSION):
        raise CacheFileError(
            f"it has format version {found.get('format_version')!r}, and this release of kvq reads {FORMAT_VERSION}"
        )
    container.check_checksum()
    container.check_table()
    try:
        header = CalibrationHeader.model_validate_json(found.get(_HEADER, ""))
    except ValidationError as error:
        raise CacheFileError(f"its header is wrong: {error.errors(include_url=False)[0]['msg']}") from error
    layers = dict(_read_layers(container))
    return CalibrationContent(layers, header.model, header.text, header.tokens)


def _read_layers(container: ContainerReader) -> Iterator[tuple[tuple[int, Side], LayerStatistics]]:
    for layer_idx, side in sorted({_parse(name) for name in container.tensors}):
        prefix = f"layers.{layer_idx}.{side}."
        own = {name.removeprefix(prefix): spec for name, spec in container.tensors.items() if name.startswith(prefix)}
        _check(prefix, own)
        tensors = {name: container.read(prefix + name) for name in own}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise CacheFileError(f"{prefix[:-1]} has numbers that are not finite")
        yield (layer_idx, side), LayerStatistics(**tensors)


def _parse(name: str) -> tuple[int, Side]:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "layers" and parts[1].isdecimal() and parts[2] in get_args(Side):
        side: Side = "key" if parts[2] == "key" else "value"
        return int(parts[1]), side
    raise CacheFileError(f"it has a tensor {name!r}, which no calibration has")


def _check(prefix: str, own: Mapping[str, TensorSpec]) -> None:
    missing, unknown = {*_NAMES} - {_OPTIONAL} - own.keys(), own.keys() - {*_NAMES}
    if missing or unknown:
        raise CacheFileError(f"{prefix[:-1]} lacks {sorted(missing)} and has {sorted(unknown)} beyond what is known")
    shape = own["mean"].shape
    if len(shape) != 2:
        raise CacheFileError(f"{prefix}mean is {own['mean']}, not [heads, head dim]")
    for name, spec in own.items():
        expected = TensorSpec((*shape, shape[1]) if name in _MATRICES else shape, torch.float32)
        if spec != expected:
            raise CacheFileError(f"{prefix}{name} is {spec}, not {expected}")
