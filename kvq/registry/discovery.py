"""Who claims which backend name, read from entry-point metadata without importing anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.utils import canonicalize_name

ENTRY_POINT_GROUP = "kvq.backends"
OWN_DISTRIBUTION = "kvq"


@dataclass(frozen=True)
class Claim:
    """One entry point, and the distribution that it came with.

    Attributes:
        entry_point: the entry point to load.
        distribution: name of the distribution, or an empty string if its metadata lacks it.
        version: its version, or an empty string.
    """

    entry_point: metadata.EntryPoint
    distribution: str
    version: str

    @classmethod
    def of(cls, entry_point: metadata.EntryPoint) -> Claim:
        """Read the distribution of an entry point."""
        return cls(entry_point, *_read_name_and_version(entry_point.dist))

    @property
    def is_own(self) -> bool:
        """Whether it is one of kvq's own backends."""
        return canonicalize_name(self.distribution) == OWN_DISTRIBUTION

    def __str__(self) -> str:
        """Return "distribution version", or "an unknown distribution", and the module to load."""
        label = f"{self.distribution} {self.version}".strip() or "an unknown distribution"
        return f"{label} ({self.entry_point.value})"


@dataclass(frozen=True)
class ClaimedName:
    """All claims to one name.

    Attributes:
        owners: exactly one; more are a conflict.
        ignored: claims of others to a name of kvq's own distribution, which is reserved.
    """

    owners: tuple[Claim, ...]
    ignored: tuple[Claim, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether the name is one of kvq's own."""
        return self.owners[0].is_own


def _read_name_and_version(distribution: metadata.Distribution | None) -> tuple[str, str]:
    # A damaged installation lacks its METADATA, or fields of it: None in older Pythons, an error in newer ones.
    if distribution is None:
        return "", ""
    try:
        return distribution.name or "", distribution.version or ""
    except (KeyError, OSError, metadata.PackageNotFoundError):
        return "", ""


def find_entry_points() -> Iterable[metadata.EntryPoint]:
    """Return the installed entry points of the group `kvq.backends`."""
    return metadata.entry_points(group=ENTRY_POINT_GROUP)


def group_claims(entry_points: Iterable[metadata.EntryPoint]) -> dict[str, ClaimedName]:
    """Return the claims to each name, sorted by name.

    A claim seen twice is one: the same distribution may be found in two places on `sys.path`, such as an editable
    installation and the checkout that it points to.
    """
    claims: dict[str, dict[tuple[str, str], Claim]] = {}
    for entry_point in entry_points:
        claim = Claim.of(entry_point)
        identity = canonicalize_name(claim.distribution), entry_point.value
        claims.setdefault(entry_point.name, {}).setdefault(identity, claim)
    return {name: _settle(tuple(claims[name].values())) for name in sorted(claims)}


def _settle(claims: tuple[Claim, ...]) -> ClaimedName:
    ours = tuple(claim for claim in claims if claim.is_own)
    if not ours:
        return ClaimedName(claims)
    return ClaimedName(ours[:1], tuple(claim for claim in claims if not claim.is_own))


def join_claims(claims: Iterable[Claim]) -> str:
    """Return the claims as a phrase that names every distribution with its version."""
    return " and ".join(str(claim) for claim in claims)
