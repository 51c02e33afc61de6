"""The bits, axes and group sizes that a backend accepts, and the words that its integer axes mean."""

from __future__ import annotations

from typing import Any

from kvq.config.backend_choice import get_side_backend
from kvq.config.faults import shown
from kvq.config.field_types import SIDES, KeyValue, of_side
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import TRANSFORMERS_AXIS_NAMES, Granularity
from kvq.user_warnings import warn_user

CHANNEL_GROUP_MULTIPLE = 8
"""Per-channel groups lie along tokens, and eight tokens at the lowest width fill one byte."""

_warned_axes: set[tuple[str, int]] = set()


def check_nbits(nbits: float, backend: BackendSpec) -> None:
    """Check that the backend has codes of that many bits.

    Raises:
        ValueError: it does not.
    """
    accepted = backend.capabilities.nbits
    if nbits not in accepted:
        choices = ", ".join(f"{bits:g}" for bits in sorted(accepted))
        raise ValueError(f"{shown(nbits)} is not supported by backend {backend.name!r}; choose one of {choices}")


def check_granularity(granularity: Granularity, backend: BackendSpec) -> None:
    """Check that the backend has groups of that direction.

    Raises:
        ValueError: it does not.
    """
    accepted = backend.capabilities.granularities
    if granularity not in accepted:
        choices = ", ".join(repr(str(word)) for word in accepted)
        given = repr(str(granularity))
        raise ValueError(f"{given} is not supported by backend {backend.name!r}; choose one of {choices}")


def resolve_axis(axis: Granularity | int, backend: BackendSpec, field: str) -> Granularity:
    """Return the word for an axis; an integer has the meaning that the backend's own library gives it.

    Warn once if an integer means the opposite of its meaning for transformers' default backend.

    Args:
        axis: a word, which is returned as it is, or an integer.
        backend: the backend that gives integers their meaning.
        field: the field's name, for the warning.

    Raises:
        ValueError: the backend gives this integer no meaning.
    """
    if isinstance(axis, Granularity):
        return axis
    meaning = backend.axis_names.get(axis)
    if meaning is None:
        choices = "".join(f"{number} ({word}), " for number, word in backend.axis_names.items())
        raise ValueError(
            f"{shown(axis)} is not an axis of backend {backend.name!r}; "
            f"choose one of {choices}'per_token', 'per_channel'"
        )
    usual = TRANSFORMERS_AXIS_NAMES.get(axis, meaning)
    if meaning is not usual and (backend.name, axis) not in _warned_axes:
        _warned_axes.add((backend.name, axis))
        warn_user(
            f"{field}={axis} means {meaning} to backend {backend.name!r}, but {usual} to the default backend of "
            f"transformers; write {str(meaning)!r}, which stays the same when the backend is switched"
        )
    return meaning


def check_group_size(group_size: int, granularity: Granularity) -> None:
    """Check that groups of that length can be stored in whole bytes.

    Raises:
        ValueError: they cannot be.
    """
    if granularity is Granularity.PER_CHANNEL and group_size % CHANNEL_GROUP_MULTIPLE:
        raise ValueError(
            f"{group_size} does not fit {str(granularity)!r} groups, which lie along tokens; "
            f"choose a multiple of {CHANNEL_GROUP_MULTIPLE}"
        )


def check_balance(balance: str, granularity: Granularity) -> None:
    """Check that the groups are of the direction that balance is for.

    Raises:
        ValueError: they are not.
    """
    if balance == "rms" and granularity is not Granularity.PER_CHANNEL:
        raise ValueError(
            f"{shown(balance)} does not fit {str(granularity)!r} groups, whose scales are those of single tokens "
            "already; choose 'none', or 'per_channel' groups"
        )


def warn_of_unused_group_size(place: str, choice: Any, sizes: Any, usual: int) -> None:
    """Warn if a group size was set for a side whose backend groups numbers in a way of its own.

    Args:
        place: where the field stands, before its name.
        choice: the backend, or one a side.
        sizes: the group size, or one a side; one for both may be meant for the other side.
        usual: the size that nobody has set: a file that was written out holds it.
    """
    backends = [(side, get_side_backend(choice, side)) for side in SIDES]
    is_split = isinstance(sizes, KeyValue)
    if not is_split and any(backend.uses_group_size for _, backend in backends):
        return
    for side, backend in backends if is_split else backends[:1]:
        size = of_side(sizes, side)
        if size != usual and not backend.uses_group_size:
            field = f"{place}q_group_size{f'.{side}' if is_split else ''}"
            warn_user(f"{field}={size} has no effect: backend {backend.name!r} has groups of its own; leave it out")
