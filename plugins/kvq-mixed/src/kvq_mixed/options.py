"""The options under `backend_options: {mixed: ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvq.plugin_api import BackendOptions


class MixedOptions(BackendOptions):
    """Options of the mixed backend."""

    choose_by: Literal["scores", "range"] = Field(
        default="scores",
        description="which channels get 4 bits: `scores`, those whose errors cost the scores most; `range`, the widest",
    )
