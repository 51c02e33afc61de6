"""Everything that the author of a backend imports, and nothing else.

A backend is a module with one hook, named by an entry point in the group `kvq.backends`:

    from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, hookimpl

    @hookimpl
    def kvq_backend() -> BackendSpec:
        return BackendSpec(name="mine", api_version=API_VERSION, capabilities=Capabilities(nbits=(4,)), build=build)

Keep that module light: it is imported when the backend is named, the vendor's library only inside `build`.
"""

from __future__ import annotations

import pluggy

from kvq.backend_spec import API_VERSION, BackendOptions, BackendSpec, Capabilities
from kvq.errors import KVQError, QuantizerContractError
from kvq.granularity import AxisNames, Granularity
from kvq.quantizer import AffineQuantizer, FusedScores, Part, Quantizer, QuantSpec, Side

__all__ = [
    "API_VERSION",
    "AffineQuantizer",
    "AxisNames",
    "BackendOptions",
    "BackendSpec",
    "Capabilities",
    "FusedScores",
    "Granularity",
    "KVQError",
    "Part",
    "QuantSpec",
    "Quantizer",
    "QuantizerContractError",
    "Side",
    "hookimpl",
    "hookspec",
]

PROJECT_NAME = "kvq"
"""The name under which pluggy knows hooks of this project."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def kvq_backend() -> BackendSpec:  # type: ignore[empty-body]  # a declaration: pluggy never calls it
    """Return the one backend that this plugin offers."""
