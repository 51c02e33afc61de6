"""Warnings that point at the caller's own line, however deep in the package they are raised."""

from __future__ import annotations

import inspect
import warnings

_PASSED_PACKAGES = frozenset({"kvq", "pydantic", "torch", "transformers"})
"""Frames of these lie between the user's call and the check that warns."""


_told: set[str] = set()


def warn_user_once(message: str) -> None:
    """Warn as `warn_user`, but each message only once in a process."""
    if message not in _told:
        _told.add(message)
        warn_user(message)


def warn_user(message: str) -> None:
    """Warn at the innermost calling line outside kvq and the libraries that call it."""
    level = 1
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in _PASSED_PACKAGES:
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)
