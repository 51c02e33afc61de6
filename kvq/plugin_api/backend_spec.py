"""What a backend says of itself: import-light, so that it can be read without the vendor's library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kvq.plugin_api.granularity import TRANSFORMERS_AXIS_NAMES, AxisNames, Granularity
from kvq.plugin_api.quantizer import AffineQuantizer, Quantizer, QuantSpec

API_VERSION = 1
"""Version of the plugin contract; a backend built for another one is refused."""


DEFAULT_FIELDS = (
    *("nbits_k", "nbits_v", "axis_key", "axis_value", "q_group_size"),
    *("rotation_k", "rotation_v", "balance_k", "balance_v", "clip_k", "clip_v"),
)
"""The fields of a configuration for which a backend may propose its own values."""
CALIBRATION_WORDS = ("unused", "optional", "required")
"""What a backend may say of the statistics of a model."""


class BackendOptions(BaseModel):
    """Base of a backend's own options: frozen, unknown keys forbidden; give every field a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        nbits: every accepted number of bits per code; fractional ones are legal.
        granularities: the accepted directions of groups.
        device_types: accepted `torch.device` types; empty: any.
        states_dtypes: accepted dtypes of the states by name, e.g. `bfloat16`; empty: any.
    """

    nbits: tuple[float, ...]
    granularities: tuple[Granularity, ...] = (Granularity.PER_TOKEN, Granularity.PER_CHANNEL)
    device_types: tuple[str, ...] = ()
    states_dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackendSpec:
    """A backend as it offers itself to the registry.

    Attributes:
        name: the string that users write as `backend=`; equal to the entry point's name.
        api_version: the `API_VERSION` that the backend was written for.
        capabilities: what it accepts.
        build: makes a quantizer for one side of one layer from a `QuantSpec` and validated options.
        options: pydantic model of `backend_options[name]`.
        axis_names: what integer axes mean in the backend's own library.
        requires: requirement strings (PEP 508) of what `build` imports, checked from metadata before it is called.
        summary: one line for `kvq backends`.
        defaults: what users get where they set nothing, by the name of the field: any of `DEFAULT_FIELDS`, with values
            as in a file. They rank below what a user or a preset says, and above kvq's own defaults.
        uses_group_size: whether `q_group_size` changes anything; where False, kvq warns of a value that was set.
        url: where to read more.
        calibration: whether `QuantSpec.statistics` is read, and what becomes of a user who gives none: `unused` (the
            backend is given none), `optional` or `required` (a configuration without them is refused).
    """

    name: str
    api_version: int
    capabilities: Capabilities
    build: Callable[[QuantSpec, Any], AffineQuantizer | Quantizer]
    options: type[BackendOptions] = BackendOptions
    axis_names: AxisNames = field(default_factory=lambda: TRANSFORMERS_AXIS_NAMES, hash=False)
    requires: tuple[str, ...] = ()
    summary: str = ""
    url: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    uses_group_size: bool = True
    calibration: Literal["unused", "optional", "required"] = "unused"

    def build_options(self, options: Mapping[str, Any] | None = None) -> BackendOptions:
        """Return validated options.

        Raises:
            pydantic.ValidationError: an option is unknown or has a wrong value.
        """
        return self.options.model_validate(dict(options or {}))
