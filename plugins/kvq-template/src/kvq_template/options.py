"""The options under `backend_options: {template: ...}`."""

from __future__ import annotations

from pydantic import Field

from kvq.plugin_api import BackendOptions


class TemplateOptions(BackendOptions):
    """Options of the template backend."""

    clip: float = Field(default=1.0, gt=0, le=1, description="share of the largest magnitude that the codes reach")
