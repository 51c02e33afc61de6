"""The options under `backend_options: {fp8: ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvq.plugin_api import BackendOptions


class Float8Options(BackendOptions):
    """Options of the fp8 backend."""

    format: Literal["e4m3", "e5m2"] = Field(
        default="e4m3", description="e4m3: 3 bits of mantissa, a range of 2 ** 18; e5m2: 2 bits, a range of 2 ** 32"
    )
