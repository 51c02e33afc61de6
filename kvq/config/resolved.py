"""The settings of one layer, after names are looked up and per-layer settings applied: all that a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvq.calibration import Calibration
from kvq.config.backend_choice import get_side_backend
from kvq.config.field_types import Balance, Clip, Rotation, Rounding, of_side
from kvq.config.layer_config import AXIS_FIELDS, BALANCE_FIELDS, CLIP_FIELDS, NBITS_FIELDS, ROTATION_FIELDS
from kvq.config.rounding_choice import NEAREST, ROUNDING_FIELD
from kvq.plugin_api.backend_spec import BackendOptions, BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Side


@dataclass(frozen=True)
class ResolvedSide:
    """All settings of one side of one layer.

    Attributes:
        backend: the backend that quantizes it.
        options: the backend's own options, validated.
        nbits: bits per code.
        granularity: direction of the groups.
        group_size: elements per scale, as configured.
        rotation: the rotation applied to the states before they are quantized; `auto`: where it can help.
        balance: how tokens are evened out between rotating and quantizing; `auto`: where it can help.
        clip: the part of each group's range that codes are spread over, or `none`: all; `auto`: what suits the width.
        metadata_dtype: dtype of scale and mid, or None: the core chooses.
        calibration: statistics of the model, or None.
        rounding: how codes are chosen; `nearest` for values.
    """

    backend: BackendSpec
    options: BackendOptions
    nbits: float
    granularity: Granularity
    group_size: int
    rotation: Rotation
    balance: Balance
    clip: Clip
    metadata_dtype: torch.dtype | None
    calibration: Calibration | None = None
    rounding: Rounding = "nearest"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], side: Side) -> ResolvedSide:
        """Take the settings of one side from the fields of a configuration."""
        backend = get_side_backend(fields["backend"], side)
        return cls(
            backend=backend,
            options=backend.build_options(fields["backend_options"].get(backend.name)),
            nbits=fields[NBITS_FIELDS[side]],
            granularity=fields[AXIS_FIELDS[side]],
            group_size=of_side(fields["q_group_size"], side),
            rotation=fields[ROTATION_FIELDS[side]],
            balance=fields[BALANCE_FIELDS[side]],
            clip=fields[CLIP_FIELDS[side]],
            metadata_dtype=fields["metadata_dtype"],
            calibration=fields.get("calibration"),
            rounding=fields[ROUNDING_FIELD] if side == "key" else NEAREST,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ResolvedSide:
        return self


@dataclass(frozen=True)
class ResolvedLayer:
    """All settings of one layer.

    Attributes:
        key, value: the settings of each side.
        residual_length: newest tokens that are always exact.
        sink_length: first real tokens of each row that are always exact.
        compute_dtype: dtype that dequantization computes in, or None: float32.
        device: device of the packed store, or None: with the states.
        full_precision: whether nothing of the layer is quantized.
    """

    key: ResolvedSide
    value: ResolvedSide
    residual_length: int
    sink_length: int
    compute_dtype: torch.dtype | None
    device: torch.device | None
    full_precision: bool

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ResolvedLayer:
        """Split the fields of a configuration, those of the layer over those of the cache, by side."""
        return cls(
            key=ResolvedSide.from_fields(fields, "key"),
            value=ResolvedSide.from_fields(fields, "value"),
            residual_length=fields["residual_length"],
            sink_length=fields["sink_length"],
            compute_dtype=fields["compute_dtype"],
            device=fields["device"],
            full_precision=fields.get("full_precision", False),
        )

    def side(self, name: Side) -> ResolvedSide:
        """Return the settings of the keys or of the values."""
        return self.key if name == "key" else self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> ResolvedLayer:
        return self
