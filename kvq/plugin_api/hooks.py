"""The hook by which pluggy asks a plugin for its backend, and the markers around it."""

from __future__ import annotations

import pluggy

from kvq.plugin_api.backend_spec import BackendSpec

PROJECT_NAME = "kvq"
"""The name under which pluggy knows hooks of this project."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def kvq_backend() -> BackendSpec:  # type: ignore[empty-body]  # a declaration: pluggy never calls it
    """Return the one backend that this plugin offers."""
