"""The options under `backend_options: {torchao-mx: ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvq.plugin_api import BackendOptions


class MXOptions(BackendOptions):
    """Options of the torchao-mx backend."""

    scaling: Literal["floor", "ceil", "even", "rceil"] = Field(
        default="even",
        description=(
            "how the power of two of 32 elements is chosen: floor (the specification's own way: large elements may be "
            "cut off), ceil, rceil (the smallest that cuts nothing off) or even (the least error on normal states)"
        ),
    )
