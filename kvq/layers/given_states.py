"""Checks of the states that a model gives to a layer."""

from __future__ import annotations

import torch

from kvq.errors import StatesError

STATES_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes of states that can be quantized."""


def check_states(layer: str, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Check that keys and values can be quantized.

    Args:
        layer: the layer's name in errors.
        keys: `[B, H, T, D_k]`.
        values: `[B, H, T, D_v]`.

    Raises:
        StatesError: rank or dtype do not fit.
    """
    for what, states in ((f"{layer}: key states", keys), (f"{layer}: value states", values)):
        if not isinstance(states, torch.Tensor):
            raise StatesError(f"{what} are a {type(states).__name__}, not a tensor")
        if states.dim() != 4 or 0 in (states.shape[0], states.shape[1], states.shape[3]):
            raise StatesError(
                f"{what} have shape {list(states.shape)}; "
                "[batch, heads, tokens, head_dim] is needed, of which only the tokens may be 0"
            )
        if states.dtype not in STATES_DTYPES:
            raise StatesError(
                f"{what} of {states.dtype} cannot be quantized; "
                f"the cache takes {', '.join(map(str, STATES_DTYPES))}: load the model in one of these"
            )


def check_pair(layer: str, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Check that keys and values are those of the same tokens.

    Args:
        layer: the layer's name in errors.
        keys: `[B, H, T, D_k]`.
        values: `[B, H, T, D_v]`.

    Raises:
        StatesError: batch or tokens differ.
    """
    if keys.shape[0] != values.shape[0] or keys.shape[2] != values.shape[2]:
        raise StatesError(f"{layer}: keys {list(keys.shape)} and values {list(values.shape)} differ in batch or tokens")


def check_continuity(what: str, states: torch.Tensor, held: torch.Tensor) -> None:
    """Check that states go on from those that a layer holds.

    Args:
        what: the states' name in errors.
        states: `[B, H, T, D]`.
        held: some that the layer holds.

    Raises:
        StatesError: batch, heads, head dim, dtype or device differ.
    """
    check_rows(what, states, held.shape[0])
    found = (states.shape[1], states.shape[3], states.dtype, states.device)
    wanted = (held.shape[1], held.shape[3], held.dtype, held.device)
    for aspect, new, old in zip(("heads", "head_dim", "dtype", "device"), found, wanted, strict=True):
        if new != old:
            raise StatesError(
                f"{what} have {aspect} {new}, but the cache holds {aspect} {old}; use a new cache, or reset this one"
            )


def goes_on(states: object, held: torch.Tensor) -> bool:
    """Return whether states `[B, H, T, D]` go on from `held`; where they do not, `check_continuity` says why."""
    if not isinstance(states, torch.Tensor) or states.dtype is not held.dtype or states.device != held.device:
        return False
    new, old = states.shape, held.shape
    return len(new) == 4 and new[0] == old[0] and new[1] == old[1] and new[3] == old[3]


def check_rows(what: str, states: torch.Tensor, held: int | None) -> None:
    """Check that states have as many rows as a layer holds.

    Args:
        what: the states' name in errors.
        states: `[B, H, T, D]`.
        held: rows of the layer, or None where it holds nothing.

    Raises:
        StatesError: they have fewer or more.
    """
    if held is None or states.shape[0] == held:
        return
    advice = "use a new cache, or reset this one"
    if held and states.shape[0] > held and states.shape[0] % held == 0:
        repeats = states.shape[0] // held
        advice = (
            f"cache.batch_repeat_interleave({repeats}) repeats each row for as many sequences or beams, and "
            "cache.fork() before it keeps a cache as it is; or use a new cache"
        )
    raise StatesError(f"{what} have batch size {states.shape[0]}, but the cache holds batch size {held}; {advice}")
