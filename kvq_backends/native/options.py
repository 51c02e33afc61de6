"""The options under `backend_options["native"]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvq.plugin_api import BackendOptions


class NativeOptions(BackendOptions):
    """Options of the native backend."""

    clip: Literal["none", "mse"] = Field(
        default="none",
        description=(
            "none or mse. none: spread the codes between the extremes of each group: no error exceeds half a step. "
            "mse: also try narrower ranges and keep the one with the least squared error, for few bits and groups with "
            "outliers; about 10 times the work, and an outlier may come back far smaller"
        ),
    )
    clip_candidates: int = Field(
        default=16,
        ge=1,
        le=256,
        description="how many narrower ranges clip=mse tries, evenly spaced down to a fifth of the range; 1 to 256",
    )
