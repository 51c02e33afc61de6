"""Installed versions against requirements, from metadata alone: it works where nothing can be imported."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion


def describe_requirement(text: str) -> dict[str, Any]:
    """Return a requirement as `name`, `required`, `installed` (a version or None) and `met`."""
    requirement = Requirement(text)
    installed = find_version(requirement.name)
    met = installed is not None and is_accepted(installed, requirement.specifier)
    return {"name": requirement.name, "required": str(requirement.specifier), "installed": installed, "met": met}


def applies(text: str) -> bool:
    """Return whether a requirement holds here: for this Python and platform, and for no extra."""
    marker = Requirement(text).marker
    return marker is None or marker.evaluate({"extra": ""})


def find_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        # None, or a KeyError in newer Pythons, where an installation is damaged and its metadata lacks the version.
        return metadata.version(distribution) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def is_accepted(version: str, specifier: SpecifierSet) -> bool:
    """Return whether a version is in a range; a pre-release in it counts."""
    try:
        return specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
