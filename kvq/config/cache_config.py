"""The configuration of a cache: the fields that users write, checked as a whole.

Owns the fields, their defaults and how they depend on each other. It asks the registry what a backend accepts; it must
not know how anything is quantized or stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from kvq.calibration import Calibration
from kvq.config.backend_choice import BackendChoice, check_backends, check_writable, get_side_backend
from kvq.config.backend_defaults import fill_in_defaults
from kvq.config.backend_limits import (
    check_balance,
    check_granularity,
    check_group_size,
    check_nbits,
    resolve_axis,
    warn_of_unused_group_size,
)
from kvq.config.backend_options import resolve_options
from kvq.config.calibration_choice import FIELD as CALIBRATION_FIELD
from kvq.config.calibration_choice import UNUSED, GivenCalibration, check_named, check_needed, place_beside
from kvq.config.faults import FaultCollector, not_accepted, shown
from kvq.config.field_types import (
    FORMAT_VERSION,
    SIDES,
    Axis,
    Balance,
    Bits,
    Clip,
    Device,
    Dtype,
    GroupSize,
    KeyValue,
    MetadataDtype,
    Rotation,
    Rounding,
    Tokens,
    Version,
    find_integer,
    of_side,
)
from kvq.config.files import load_mapping
from kvq.config.frozen import FrozenDict, FrozenModel
from kvq.config.layer_config import AXIS_FIELDS, BALANCE_FIELDS, CLIP_FIELDS, SIDE_OF_FIELD, LayerConfig, resolve_layers
from kvq.config.layer_selector import LayerSelector, find_selector
from kvq.config.plain_values import find_strange_values
from kvq.config.presets import FIELD as PRESET_FIELD
from kvq.config.presets import add_to_schema, expand_preset
from kvq.config.resolved import ResolvedLayer
from kvq.config.rounding_choice import ROUNDING_FIELD, check_rounding, list_places, warn_of_unknown_queries
from kvq.errors import ConfigError, Fault
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.user_warnings import warn_user

if TYPE_CHECKING:
    from dataclasses import InitVar

DEFAULT_BACKEND = "quanto"
DEFAULT_GROUP_SIZE = 64


class KVQCacheConfig(FrozenModel):
    """Configuration of a `KVQ` cache, from keywords, a mapping, YAML or JSON.

    It is frozen, and refuses unknown keys. Equal configurations compare equal, whether they came from keywords or a
    file. `preset="4bit"` beside the fields gives those that are not set (`kvq.config.PRESETS` has them); it is not kept
    itself.

    Raises:
        ConfigError: something is wrong; it lists every fault with its path, the value given and the values accepted.
        BackendError: the only fault is that the backend is unavailable.
    """

    model_config = ConfigDict(json_schema_extra=add_to_schema)
    __hash__ = None  # type: ignore[assignment]  # equal by value, and nothing that a set should hold

    if TYPE_CHECKING:  # no field: it is replaced before pydantic sees it, but a checker of types must know the keyword
        preset: InitVar[str] = ""  # type: ignore[misc, assignment]  # pydantic's plugin knows none

    version: Version = Field(default=FORMAT_VERSION, description="version of this format")
    backend: BackendChoice = Field(
        default=DEFAULT_BACKEND,
        description="name of a backend (`kvq backends` lists them), a `BackendSpec`, or `{key: ..., value: ...}`",
    )
    nbits_k: Bits = Field(default=4, description="bits per code of the keys; fractional if the backend supports it")
    nbits_v: Bits = Field(default=2, description="bits per code of the values")
    axis_key: Axis = Field(
        default=Granularity.PER_CHANNEL,
        description="`per_channel` or `per_token`; an integer has the meaning of the backend's own library",
    )
    axis_value: Axis = Field(default=Granularity.PER_CHANNEL, description="the same for the values")
    q_group_size: GroupSize = Field(
        default=DEFAULT_GROUP_SIZE, description="elements per scale; one number or `{key: ..., value: ...}`"
    )
    residual_length: Tokens = Field(default=32, description="how many of the newest tokens stay exact")
    sink_length: Tokens = Field(default=4, description="how many of the first real tokens of each row stay exact")
    rotation_k: Rotation = Field(
        default="auto",
        description="`hadamard`, `none`, or `auto`: `hadamard` where it helps and is safe: for affine backends, "
        "`per_channel` groups and head dims that 16 divides",
    )
    rotation_v: Rotation = Field(default="auto", description="the same for the values")
    balance_k: Balance = Field(
        default="auto",
        description="`rms`: tokens are divided by factors, a byte each, before they are quantized (for affine backends "
        "and `per_channel` groups); `none`; or `auto`: `rms` where it can be",
    )
    balance_v: Balance = Field(default="auto", description="the same for the values")
    clip_k: Clip = Field(
        default="auto",
        description="the part of each group's range that codes are spread over, such as 0.9, elements beyond it being "
        "cut (for affine backends); `none`: all of it; or `auto`: what suits the width, if rotated and `per_channel`",
    )
    clip_v: Clip = Field(default="auto", description="the same for the values")
    rounding_k: Rounding = Field(
        default="nearest",
        description="`nearest`, or `error_feedback`: keys get the codes that suit the queries that a `calibration` "
        "saw, in the same bytes (for backends that say that they round to nearest: `native`)",
    )
    compute_dtype: Dtype | None = Field(
        default=None,
        description="dtype that dequantization computes in; default: float32, then rounded once to the states' dtype",
    )
    metadata_dtype: MetadataDtype | None = Field(
        default=None,
        description="dtype of scale and mid; default: float16, but float32 for mid above 4 bits or in short groups. "
        "`int8`: a byte each, for codes of up to 4 bits, best in `per_channel` groups; wider ones keep the default",
    )
    device: Device | None = Field(
        default=None, description="device of the packed store; default, or the states' own device type: with the states"
    )
    sliding: Literal["keep", "quantize"] = Field(
        default="keep",
        description="sliding-window layers: `keep` transformers' bounded layers, or `quantize` them",
    )
    cross_attention: Literal["keep", "quantize"] = Field(
        default="keep",
        description="encoder-decoder models: `keep` cross-attention in full precision, or `quantize` it too",
    )
    layers: dict[str, LayerConfig] = Field(
        default_factory=dict,
        description='per-layer settings by index, `"a-b"`, `"first:N"` or `"last:N"`; see `LayerConfig`',
    )
    backend_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options by backend name, checked by that backend's own model"
    )
    calibration: GivenCalibration | None = Field(
        default=None,
        description="statistics of the model for `rounding_k`, and for backends that ask for them: the path of a file "
        "that `kvq calibrate` wrote, in a file relative to its folder; `{file: ..., digest: ...}`; or `standard`: of "
        "standard normal states",
    )

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, value: Any) -> Any:
        check_backends(value)
        return value

    @field_validator("nbits_k", "nbits_v")
    @classmethod
    def _check_nbits(cls, value: float, info: ValidationInfo) -> float:
        backend = _backend_of_field(info)
        if backend is not None:
            check_nbits(value, backend)
        return value

    @field_validator("axis_key", "axis_value")
    @classmethod
    def _resolve_axis(cls, value: Granularity | int, info: ValidationInfo) -> Granularity | int:
        backend = _backend_of_field(info)
        if backend is None:
            return value
        granularity = resolve_axis(value, backend, str(info.field_name))
        check_granularity(granularity, backend)
        return granularity

    @field_validator("q_group_size")
    @classmethod
    def _check_group_size(cls, value: Any, info: ValidationInfo) -> Any:
        faults = FaultCollector()
        for side in SIDES:
            axis = info.data.get(AXIS_FIELDS[side])
            with faults.at(*([side] if isinstance(value, KeyValue) else [])):
                if isinstance(axis, Granularity):
                    check_group_size(of_side(value, side), axis)
        faults.raise_faults()
        return value

    @field_validator("balance_k", "balance_v")
    @classmethod
    def _check_balance(cls, value: str, info: ValidationInfo) -> str:
        axis = info.data.get(AXIS_FIELDS[SIDE_OF_FIELD[str(info.field_name)]])
        if isinstance(axis, Granularity):
            check_balance(value, axis)
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _name_layers(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named: dict[Any, Any] = {}
        for key, layer in value.items():
            index = find_integer(key)
            text = key if index is None else str(index)
            if not isinstance(text, str):
                raise not_accepted(key, "an index, 'a-b', 'first:N' or 'last:N' as the key of an entry")
            if text in named:
                raise ValueError(f"{text!r} is given twice, as a number and as a string; keep one of them")
            named[text] = layer
        return named

    @field_validator("layers")
    @classmethod
    def _resolve_layers(cls, value: dict[str, LayerConfig], info: ValidationInfo) -> dict[str, LayerConfig]:
        return FrozenDict(resolve_layers(value, info.data))

    @field_validator("backend_options")
    @classmethod
    def _resolve_options(cls, value: dict[str, dict[str, Any]], info: ValidationInfo) -> Mapping[str, Any]:
        layers = info.data.get("layers", {})
        return resolve_options(value, [info.data.get("backend"), *(layer.backend for layer in layers.values())])

    @field_validator("calibration")
    @classmethod
    def _check_calibration(cls, value: Calibration | None, info: ValidationInfo) -> Calibration | None:
        check_needed(value, _list_backends(info.data))
        check_rounding(value, list_places(info.data))
        return value

    def model_post_init(self, context: Any) -> None:  # noqa: ARG002  # pydantic passes it
        """Warn of settings without effect, and of keys with fewer bits than values, usually the wrong way round."""
        self._warn_of_unused_calibration()
        places = {
            "": LayerConfig(nbits_k=self.nbits_k),
            **{f"layers[{text!r}].": own for text, own in self.layers.items()},
        }
        below = []
        for place, own in places.items():
            fields = {**dict(self), **own.given}
            if place == "" or "q_group_size" in own.given:
                warn_of_unused_group_size(place, fields["backend"], fields["q_group_size"], DEFAULT_GROUP_SIZE)
            nbits_k, nbits_v = fields["nbits_k"], fields["nbits_v"]
            if nbits_k < nbits_v and own.given.keys() & {"nbits_k", "nbits_v"}:
                below.append(f"{place}nbits_k={nbits_k} is below {place}nbits_v={nbits_v}")
        if below:
            others = f" ({len(below)} such places)" if len(below) > 1 else ""
            warn_user(
                f"{below[0]}{others}: keys are usually the more sensitive side (arXiv 2502.15075); measure before you "
                "rely on it"
            )

    def _warn_of_unused_calibration(self) -> None:
        specs = _list_backends(dict(self))
        if warn_of_unknown_queries(self.calibration, list_places(dict(self))):
            return
        if self.calibration is not None and all(spec.calibration == UNUSED for spec in specs):
            names = ", ".join(sorted({repr(spec.name) for spec in specs}))
            warn_user(f"calibration: {self.calibration} has no effect: backend {names} asks for no statistics")

    def _fill(self, fields: Mapping[str, Any], source: str | None = None) -> None:
        faults = find_strange_values(fields)
        if faults:
            raise ConfigError(faults, source)
        super()._fill(_add_defaults(_complete_older(expand_preset(fields, source))), source)

    @classmethod
    def _known_names(cls) -> list[str]:
        return [*super()._known_names(), PRESET_FIELD]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str | None = None) -> KVQCacheConfig:
        """Build a configuration from a mapping.

        Args:
            values: the fields.
            source: the file to name in errors.

        Raises:
            ConfigError, BackendError: as from the constructor; the message names `source`.
        """
        if not isinstance(values, Mapping):
            raise ConfigError([Fault((), f"a mapping of fields is needed, got {type(values).__name__}")], source)
        strange = [key for key in values if not isinstance(key, str)]
        if strange:
            raise ConfigError([Fault((), f"the keys must be names of fields, got {shown(strange)}")], source)
        config = cls.__new__(cls)
        config._fill(values, source)
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> KVQCacheConfig:
        """Read a configuration from YAML (safe subset) or JSON.

        Raises:
            ConfigError: the file cannot be read or parsed, or its content is wrong; the message names the file.
            BackendError: as from the constructor; the message names the file.
        """
        return cls.from_mapping(place_beside(load_mapping(path), path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values that YAML and JSON can hold.

        Every field is written out; an entry of `layers` has only the fields that were set.

        Raises:
            ConfigError: a backend was given as an object that is not registered, which no file can name, or a
                calibration that was never saved.
        """
        faults = FaultCollector()
        with faults.at("backend"):
            check_writable(self.backend)
        for text, layer in self.layers.items():
            with faults.at("layers", text, "backend"):
                check_writable(layer.backend)
        with faults.at():
            check_named(self.calibration)
        faults.raise_faults()
        layers = {text: layer.model_dump(mode="json", exclude_defaults=True) for text, layer in self.layers.items()}
        return {**self.model_dump(mode="json"), "layers": layers}

    def to_yaml(self) -> str:
        """Return the configuration as YAML; it raises the same errors as `to_dict`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: Any) -> KVQCacheConfig:
        """Return a configuration with some fields changed; it is checked as a whole again.

        A `preset` among the changes sets all its fields; the other changes win over it.
        """
        return type(self)(**{**dict(self), **expand_preset(changes)})

    @property
    def needs_layer_count(self) -> bool:
        """Whether a layer is counted from the end, which needs the number of the model's layers."""
        return any(LayerSelector.parse(text).counts_from_end for text in self.layers)

    def for_layer(self, layer_idx: int, num_layers: int | None = None) -> ResolvedLayer:
        """Return the settings of one layer.

        Args:
            layer_idx: index of the layer, from 0.
            num_layers: number of the model's layers; needed if a layer is counted from the end.

        Raises:
            ConfigError: `layers` does not fit a model of that length; see `find_selector`.
        """
        text = find_selector(self.layers, layer_idx, num_layers)
        own = self.layers[text].given if text is not None else {}
        return ResolvedLayer.from_fields({**dict(self), **own})


_LATER_STEPS = {*BALANCE_FIELDS.values(), *CLIP_FIELDS.values()}
"""Fields of steps that kvq learned after all others had a field: a file with all the rest was written before."""

_ALWAYS_DEFAULT = {CALIBRATION_FIELD, ROUNDING_FIELD}
"""Later fields whose default is what was done before."""


def _complete_older(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return fields as they were written before some of today's existed, with what these did not do then."""
    missing = KVQCacheConfig.model_fields.keys() - fields.keys() - _ALWAYS_DEFAULT
    return {**fields, **dict.fromkeys(missing, "none")} if missing <= _LATER_STEPS else fields


def _add_defaults(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return fill_in_defaults(fields, backend=DEFAULT_BACKEND, group_size=DEFAULT_GROUP_SIZE)


def _list_backends(fields: Mapping[str, Any]) -> list[BackendSpec]:
    """Return the backends of a configuration's fields and of its layers; none where a choice was refused."""
    choices = [fields.get("backend"), *(layer.backend for layer in fields.get("layers", {}).values())]
    return [get_side_backend(choice, side) for choice in choices if choice is not None for side in SIDES]


def _backend_of_field(info: ValidationInfo) -> BackendSpec | None:
    """Return the backend of the side that a field is about, or None if the choice itself was refused."""
    choice = info.data.get("backend")
    return None if choice is None else get_side_backend(choice, SIDE_OF_FIELD[str(info.field_name)])
