"""Compare installed versions with requirements, by metadata alone: this works even if nothing can be imported."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion


def find_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        # The metadata of a damaged installation lacks the version: None, or a KeyError in newer Pythons.
        return metadata.version(distribution) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def is_accepted(version: str, specifier: SpecifierSet) -> bool:
    """Return whether a version is in a range.

    A pre-release counts. A text that is no version at all is only in the range that accepts everything.
    """
    try:
        return specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return not specifier


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Return whether a requirement holds here: for this Python and platform, with that extra or with none."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def is_met(requirement: Requirement) -> bool:
    """Return whether the required distribution is installed in a version that the requirement accepts."""
    installed = find_version(requirement.name)
    return installed is not None and is_accepted(installed, requirement.specifier)
