"""Settings of some layers, and how they are checked against the configuration around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, StrictBool, model_validator

from kvq.config.backend_choice import BackendChoice, check_backends, get_side_backend
from kvq.config.backend_limits import check_balance, check_granularity, check_group_size, check_nbits, resolve_axis
from kvq.config.faults import FaultCollector
from kvq.config.field_types import (
    SIDES,
    Axis,
    Balance,
    Bits,
    Clip,
    Dtype,
    GroupSize,
    MetadataDtype,
    Rotation,
    Rounding,
    Tokens,
    of_side,
)
from kvq.config.frozen import FrozenModel
from kvq.config.layer_selector import LayerSelector, check_overlaps
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Side

NBITS_FIELDS: dict[Side, str] = {"key": "nbits_k", "value": "nbits_v"}
AXIS_FIELDS: dict[Side, str] = {"key": "axis_key", "value": "axis_value"}
ROTATION_FIELDS: dict[Side, str] = {"key": "rotation_k", "value": "rotation_v"}
BALANCE_FIELDS: dict[Side, str] = {"key": "balance_k", "value": "balance_v"}
CLIP_FIELDS: dict[Side, str] = {"key": "clip_k", "value": "clip_v"}
SIDE_OF_FIELD: dict[str, Side] = {
    field: side
    for fields in (NBITS_FIELDS, AXIS_FIELDS, ROTATION_FIELDS, BALANCE_FIELDS)
    for side, field in fields.items()
}


class LayerConfig(FrozenModel):
    """Settings of some layers; a field that is None is taken from the cache's configuration."""

    __hash__ = None  # type: ignore[assignment]  # equal by value, and nothing that a set should hold

    backend: BackendChoice | None = Field(default=None, description="backend of these layers")
    nbits_k: Bits | None = Field(default=None, description="bits per code of the keys")
    nbits_v: Bits | None = Field(default=None, description="bits per code of the values")
    axis_key: Axis | None = Field(default=None, description="granularity of the keys")
    axis_value: Axis | None = Field(default=None, description="granularity of the values")
    q_group_size: GroupSize | None = Field(default=None, description="elements per scale")
    residual_length: Tokens | None = Field(default=None, description="newest tokens kept exact")
    sink_length: Tokens | None = Field(default=None, description="first real tokens kept exact")
    rotation_k: Rotation | None = Field(default=None, description="rotation of the keys")
    rotation_v: Rotation | None = Field(default=None, description="rotation of the values")
    balance_k: Balance | None = Field(default=None, description="balance of the keys")
    balance_v: Balance | None = Field(default=None, description="balance of the values")
    clip_k: Clip | None = Field(default=None, description="clipping of the keys")
    clip_v: Clip | None = Field(default=None, description="clipping of the values")
    rounding_k: Rounding | None = Field(default=None, description="rounding of the keys")
    compute_dtype: Dtype | None = Field(default=None, description="dtype that dequantization computes in")
    metadata_dtype: MetadataDtype | None = Field(default=None, description="dtype of scale and mid")
    full_precision: StrictBool = Field(default=False, description="keep these layers in full precision")

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        return {name: value for name, value in self if value is not None and value is not False}

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        yield from self.given.items()

    @model_validator(mode="after")
    def _check_full_precision(self) -> LayerConfig:
        others = sorted(self.given.keys() - {"full_precision"})
        if self.full_precision and others:
            raise ValueError(
                f"full_precision=True quantizes nothing, so {', '.join(others)} would have no effect; drop one"
            )
        return self


def resolve_layers(layers: Mapping[str, LayerConfig], outer: Mapping[str, Any]) -> dict[str, LayerConfig]:
    """Check every entry of `layers`, and turn its integer axes into words.

    Args:
        layers: the entries.
        outer: the fields of the configuration around them that are valid.

    Raises:
        ConfigError: entries are wrong; it lists every fault of every entry.
    """
    faults = FaultCollector()
    selectors: list[LayerSelector] = []
    resolved: dict[str, LayerConfig] = {}
    for text, layer in layers.items():
        with faults.at(text):
            selectors.append(LayerSelector.parse(text))
        with faults.at(text):
            resolved[text] = _resolve_layer(layer, outer)
    with faults.at():
        check_overlaps(selectors)
    faults.raise_faults()
    return resolved


def _resolve_layer(layer: LayerConfig, outer: Mapping[str, Any]) -> LayerConfig:
    faults = FaultCollector()
    merged = {**outer, **layer.given}
    if layer.full_precision or "backend" not in merged:
        return layer
    with faults.at("backend"):
        check_backends(merged["backend"])
    faults.raise_faults()
    words: dict[str, Granularity] = {}
    for side in SIDES:
        words |= _resolve_side(side, layer, merged, faults)
    faults.raise_faults()
    return layer.model_copy(update=words)


def _resolve_side(
    side: Side, layer: LayerConfig, merged: Mapping[str, Any], faults: FaultCollector
) -> dict[str, Granularity]:
    """Check one side of a layer, inherited fields included; return the word for its axis, if it sets one itself."""
    backend = get_side_backend(merged["backend"], side)
    nbits_field, axis_field = NBITS_FIELDS[side], AXIS_FIELDS[side]
    touched = layer.given.keys()
    if nbits_field in merged and {"backend", nbits_field} & touched:
        with faults.at(nbits_field):
            check_nbits(merged[nbits_field], backend)
    if axis_field not in merged:
        return {}
    with faults.at(axis_field):
        granularity = resolve_axis(merged[axis_field], backend, axis_field)
        if {"backend", axis_field} & touched:
            check_granularity(granularity, backend)
        if "q_group_size" in merged and {"q_group_size", axis_field} & touched:
            with faults.at("q_group_size"):
                check_group_size(of_side(merged["q_group_size"], side), granularity)
        balance_field = BALANCE_FIELDS[side]
        if balance_field in merged and {balance_field, axis_field} & touched:
            with faults.at(balance_field):
                check_balance(merged[balance_field], granularity)
        return {axis_field: granularity} if axis_field in touched else {}
    return {}
