"""The options under `backend_options["quanto"]`."""

from __future__ import annotations

from pydantic import Field

from kvq.plugin_api import BackendOptions


class QuantoOptions(BackendOptions):
    """Options of the quanto backend.

    There is no choice of optimizer. quanto's `HqqOptimizer` unpacks on its way, which compiles a C++ extension into
    quanto's own package at first use (0.2.7), and its early stop looks at all groups of a call; the hqq backend runs
    the original of that algorithm.
    """

    symmetric_8bit: bool = Field(
        default=False,
        description=(
            "True or False; 8 bits only. False: between the extremes of the group, as at 2 and 4 bits. True: the "
            "library's own qint8, symmetric around zero, which loses to 4 bits where a channel has a bias, as keys do"
        ),
    )
