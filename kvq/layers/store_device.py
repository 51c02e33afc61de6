"""Where the store of a layer lives, by the configuration and by where its states are."""

from __future__ import annotations

import torch

from kvq.errors import ConfigError, Fault
from kvq.user_warnings import warn_user


def choose_store_device(wanted: torch.device | None, states: torch.device) -> torch.device:
    """Return the device of a store; warn where another device than the wanted one of its type is chosen.

    A device of the states' own type means "with the states": under a device_map the layers live on several devices, and
    one `device=model.device` must not gather them all on the first.

    Args:
        wanted: the configured device, or None: with the states.
        states: the device of the states.

    Raises:
        ConfigError: the wanted device cannot be used.
    """
    if wanted is None or wanted.type == states.type:
        if wanted is not None and wanted.index not in (None, states.index):
            warn_user(
                f"device={str(wanted)!r}, but states are on {str(states)!r}: the store of a layer stays with its "
                f"states on any device of that type; leave device out, or write {wanted.type!r}"
            )
        return states
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([Fault(("device",), f"{str(wanted)!r} cannot be used here: {error}")]) from error
    return wanted
