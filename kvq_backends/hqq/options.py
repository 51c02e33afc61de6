"""The options under `backend_options["hqq"]`."""

from __future__ import annotations

from pydantic import Field

from kvq.plugin_api import BackendOptions


class HQQOptions(BackendOptions):
    """Options of the hqq backend.

    hqq's `round_zero` is not offered. The optimizer overwrites a rounded zero point (0.2.8); without the optimizer it
    only adds error, since kvq stores a float offset and has no use for an integer zero point.

    The optimizer is many small operations. Where other processes want the cores too, it is several times faster with
    `torch.set_num_threads(1)`, which is the program's to call: it holds for the whole process.
    """

    optimize: bool = Field(
        default=True,
        description=(
            "True or False. True: refine the zero point of each group by half-quadratic optimization, at most 20 "
            "passes over the block, for a smaller mean error. False: round to nearest between the extremes, faster"
        ),
    )
