"""Whether what a backend requires is installed, told from metadata without an import."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from kvq.backend_spec import BackendSpec
from kvq.errors import MissingRequirementError


def check_requirements(spec: BackendSpec) -> None:
    """Check that every distribution that `spec` requires is installed in a version that it accepts.

    Raises:
        MissingRequirementError: one is absent or has another version; the message names it and the remedy.
    """
    for text in spec.requires:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        installed = _find_version(requirement.name)
        if installed is not None and _is_accepted(installed, requirement):
            continue
        found = "it is not installed" if installed is None else f"version {installed} is installed"
        raise MissingRequirementError(
            f"backend {spec.name!r} requires {text!r}, but {found}; "
            f"run: pip install {text!r}, or choose another backend (`kvq backends` lists them)"
        )


def _find_version(distribution: str) -> str | None:
    try:
        # None, or a KeyError in newer Pythons, where an installation is damaged and its metadata lacks the version.
        return metadata.version(distribution) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def _is_accepted(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
