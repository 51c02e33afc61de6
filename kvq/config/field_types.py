"""The types of single fields: which values each accepts, how it converts them and how it writes them out.

Every type refuses a wrong value with one line that shows it and says what is accepted. Nothing here knows a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from kvq.config.faults import FaultCollector, not_accepted
from kvq.config.frozen import FrozenModel
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Side

FORMAT_VERSION = 1
MAX_GROUP_SIZE = 65536
MAX_TOKENS = 1 << 40
"""More than any model reads, and far from where arithmetic on positions overflows."""
SIDES: tuple[Side, Side] = ("key", "value")

T = TypeVar("T")


class KeyValue(FrozenModel):
    """One setting for the keys, another one for the values."""

    key: Any = Field(description="for the keys")
    value: Any = Field(description="for the values")


def of_side(setting: Any, side: Side) -> Any:
    """Return the setting of one side; a setting that is not a `KeyValue` holds for both."""
    return getattr(setting, side) if isinstance(setting, KeyValue) else setting


def parse_sides(value: object, parse: Callable[[object, str], T], accepted: str) -> T | KeyValue:
    """Read one setting for both sides, or `{key: ..., value: ...}`; two equal ones become one.

    Args:
        value: the value given.
        parse: reads the setting of one side; its second argument is the description of accepted values.
        accepted: describes the values that one side accepts.

    Raises:
        ValueError: the value is not accepted.
    """
    if isinstance(value, KeyValue):
        value = {"key": value.key, "value": value.value}
    if not isinstance(value, Mapping):
        return parse(value, f"{accepted}, or {{key: ..., value: ...}}")
    if set(value) != set(SIDES):
        raise not_accepted(value, f"{accepted}, or exactly {{key: ..., value: ...}}")
    faults = FaultCollector()
    parsed: dict[str, T] = {}
    for side in SIDES:
        with faults.at(side):
            parsed[side] = parse(value[side], accepted)
    faults.raise_faults()
    return parsed["key"] if parsed["key"] == parsed["value"] else KeyValue(**parsed)


def dump_sides(setting: Any) -> Any:
    """Return plain values that `parse_sides` reads back."""
    return {side: of_side(setting, side) for side in SIDES} if isinstance(setting, KeyValue) else setting


def find_integer(value: object) -> int | None:
    """Return an integer of any library as int; None for everything else, also for a bool, a float or a string."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _parse_version(value: object) -> int:
    if find_integer(value) != FORMAT_VERSION:
        raise not_accepted(value, f"{FORMAT_VERSION}, the version of the format that this release of kvq reads")
    return FORMAT_VERSION


def _parse_tokens(value: object) -> int:
    number = find_integer(value)
    if number is None or number < 0:
        raise not_accepted(value, "an integer of at least 0 (tokens)")
    if number > MAX_TOKENS:
        raise not_accepted(value, f"at most {MAX_TOKENS:,} tokens")
    return number


def _parse_group_size(value: object) -> int | KeyValue:
    return parse_sides(value, _parse_one_group_size, "an integer of at least 2")


def _parse_one_group_size(value: object, accepted: str) -> int:
    number = find_integer(value)
    if number is None or number < 2:
        raise not_accepted(value, accepted)
    if number > MAX_GROUP_SIZE:
        raise not_accepted(value, f"at most {MAX_GROUP_SIZE}")
    return number


def _parse_nbits(value: object) -> int | float:
    number = value if isinstance(value, float) else find_integer(value)
    if number is None or not 0 < number < math.inf:
        raise not_accepted(value, "a finite number of bits above 0, such as 4")
    return int(number) if number == int(number) else float(number)


def _parse_axis(value: object) -> Granularity | int:
    number = find_integer(value)
    if number is not None:
        return number
    if isinstance(value, str) and value in set(Granularity):
        return Granularity(value)
    words = ", ".join(repr(str(word)) for word in Granularity)
    raise not_accepted(value, f"{words}, or an integer axis of the backend's own library")


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_METADATA_DTYPES = {**_DTYPES, "int8": torch.int8}


_CLIP_WORDS = ("auto", "none")


def _parse_clip(value: object) -> float | str:
    if isinstance(value, str) and value in _CLIP_WORDS:
        return value
    if not isinstance(value, float) or not 0 < value < 1:
        raise not_accepted(value, "'auto', 'none', or the part of a group's range that is kept, such as 0.9")
    return float(value)


def _choose_dtype(value: object, accepted: Mapping[str, torch.dtype]) -> torch.dtype:
    dtype = accepted.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in accepted.values():
        raise not_accepted(value, ", ".join(map(repr, accepted)))
    return dtype


def _parse_dtype(value: object) -> torch.dtype:
    return _choose_dtype(value, _DTYPES)


def _parse_metadata_dtype(value: object) -> torch.dtype:
    return _choose_dtype(value, _METADATA_DTYPES)


def _parse_device(value: object) -> torch.device:
    refused = not_accepted(value, "a device of torch that holds data, such as 'cpu' or 'cuda:0'")
    try:
        device = value if isinstance(value, torch.device) else torch.device(_device_name(value))
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise refused from error
    # torch wraps an index that is too large: 'cuda:300' becomes 'cuda:44'.
    if device.type == "meta" or (isinstance(value, str) and str(device) != value):
        raise refused
    return device


def _device_name(value: object) -> str | int:
    number = find_integer(value)
    if number is None and not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} names no device")
    return str(value) if number is None else number


def _dump_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _dump_axis(value: Granularity | int | None) -> str | int | None:
    return str(value) if isinstance(value, Granularity) else value


def sides_schema(one: dict[str, Any]) -> WithJsonSchema:
    """Return the JSON schema of a setting for both sides or one each."""
    pair = {"type": "object", "properties": {"key": one, "value": one}, "required": list(SIDES)}
    return WithJsonSchema({"anyOf": [one, pair]})


Version = Annotated[int, PlainValidator(_parse_version), WithJsonSchema({"const": FORMAT_VERSION})]
Tokens = Annotated[int, PlainValidator(_parse_tokens), WithJsonSchema({"type": "integer", "minimum": 0})]
GroupSize = Annotated[
    int | KeyValue,
    PlainValidator(_parse_group_size),
    PlainSerializer(dump_sides),
    sides_schema({"type": "integer", "minimum": 2}),
]
Bits = Annotated[int | float, PlainValidator(_parse_nbits), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Axis = Annotated[
    Granularity | int,
    PlainValidator(_parse_axis),
    PlainSerializer(_dump_axis),
    WithJsonSchema({"anyOf": [{"enum": [str(word) for word in Granularity]}, {"type": "integer"}]}),
]
Dtype = Annotated[
    torch.dtype, PlainValidator(_parse_dtype), PlainSerializer(_dump_name), WithJsonSchema({"enum": list(_DTYPES)})
]
MetadataDtype = Annotated[
    torch.dtype,
    PlainValidator(_parse_metadata_dtype),
    PlainSerializer(_dump_name),
    WithJsonSchema({"enum": list(_METADATA_DTYPES)}),
]
Device = Annotated[
    torch.device, PlainValidator(_parse_device), PlainSerializer(_dump_name), WithJsonSchema({"type": "string"})
]
Rotation = Literal["auto", "none", "hadamard"]
Balance = Literal["auto", "none", "rms"]
Rounding = Literal["nearest", "error_feedback"]
Clip = Annotated[
    float | str,
    PlainValidator(_parse_clip),
    WithJsonSchema(
        {"anyOf": [{"enum": list(_CLIP_WORDS)}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}
    ),
]
