"""What users may set under `backend_options: {template: ...}`."""

from __future__ import annotations

from kvq.plugin_api import BackendOptions
from pydantic import Field


class TemplateOptions(BackendOptions):
    """Options of the template backend."""

    clip: float = Field(default=1.0, gt=0, le=1, description="share of the largest magnitude that the codes reach")
