"""The options under `backend_options: {torchao: ...}`."""

from __future__ import annotations

from pydantic import Field

from kvq.plugin_api import BackendOptions


class TorchAOOptions(BackendOptions):
    """Options of the torchao backend."""

    preserve_zero: bool = Field(
        default=False,
        description=(
            "True: torchao's own range, which always reaches to zero and is wider than needed where a channel is far "
            "from it, as keys are. False: the smallest number of a group is taken off first, and stored with it"
        ),
    )
