"""Check from metadata, without an import, that a backend's requirements are installed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from kvq.errors import MissingRequirementError
from kvq.installed import applies, find_version, is_met

if TYPE_CHECKING:  # it imports torch, and this file must also work if that cannot be imported
    from kvq.plugin_api.backend_spec import BackendSpec


def check_requirements(spec: BackendSpec) -> None:
    """Check that every distribution that `spec` requires is installed in a version that it accepts.

    Raises:
        MissingRequirementError: one is absent or has another version; the message names it and the remedy.
    """
    for text in spec.requires:
        requirement = Requirement(text)
        if not applies(requirement) or is_met(requirement):
            continue
        installed = find_version(requirement.name)
        found = "it is not installed" if installed is None else f"version {installed} is installed"
        raise MissingRequirementError(
            f"backend {spec.name!r} requires {text!r}, but {found}; "
            f"run: pip install {text!r}, or choose another backend (`kvq backends` lists them)"
        )


def find_versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Return the installed versions of kvq, its dependencies and `others`."""
    names = [re.split(r"[^\w.-]", text)[0] for text in metadata.requires("kvq") or () if "extra ==" not in text]
    return {name: version for name in ("kvq", *names, *others) if (version := find_version(name))}
