"""The options under `backend_options: {turboquant: ...}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvq.plugin_api import BackendOptions


class TurboQuantOptions(BackendOptions):
    """Options of the turboquant backend."""

    inner_product: bool = Field(
        default=False,
        description=(
            "spend one of the bits on the signs of a random projection of the residual (QJL), which makes dot products "
            "unbiased and the states themselves less accurate"
        ),
    )
    rotation: Literal["auto", "random"] = Field(
        default="auto",
        description=(
            "`auto`: random signs and a Hadamard transform, which the fast kernels read, where the bits are a whole "
            "number, the head dim is a power of two and there is no `inner_product`; else a random matrix. `random`: "
            "a random matrix"
        ),
    )
    seed: int = Field(default=0, ge=0, description="seed of the random rotation and projection")
