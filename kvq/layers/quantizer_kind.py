"""Which of the two protocols a backend's object keeps, judged by its shape before anything is called on it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Literal

from kvq.errors import QuantizerContractError

Kind = Literal["affine", "general"]

_ARGUMENTS: dict[Kind, dict[str, int]] = {
    "affine": {"encode": 1},
    "general": {"layout": 0, "encode": 1, "decode_into": 2, "constants": 0},
}
"""The methods of each protocol, and the arguments that they are called with."""
_ATTRIBUTES: dict[Kind, tuple[str, ...]] = {"affine": ("group_local",), "general": ("group_local", "block_length")}
_NAMES: dict[Kind, str] = {"affine": "an AffineQuantizer", "general": "a Quantizer"}
_ALIKE = 0.75
"""Likeness of names from which one is taken for the other, mistyped."""


def find_kind(quantizer: object, name: str) -> Kind:
    """Return which protocol an object keeps; one that has something of `Quantizer` beyond the other is meant as one.

    Args:
        quantizer: the object that a backend built.
        name: its name in errors.

    Raises:
        QuantizerContractError: neither; the message says what is missing or wrong.
    """
    if isinstance(quantizer, type):
        raise QuantizerContractError(f"{name}: build returned the class {quantizer.__name__}; return an object of it")
    faults: dict[Kind, list[str]] = {kind: list(_find_faults(quantizer, kind)) for kind in _NAMES}
    meant: Kind = "general" if _is_meant_as_general(quantizer) else "affine"
    if not faults[meant]:
        return meant
    built = f"{name}: build returned a {type(quantizer).__name__}, which"
    if meant == "affine" and len(faults["affine"]) == len(_ARGUMENTS["affine"]) + len(_ATTRIBUTES["affine"]):
        lacks = "; ".join(f"for {_NAMES[kind]} it {' and '.join(faults[kind])}" for kind in _NAMES)
        raise QuantizerContractError(
            f"{built} has neither the methods of AffineQuantizer nor those of Quantizer: {lacks}"
        )
    raise QuantizerContractError(f"{built} looks like {_NAMES[meant]} but {' and '.join(faults[meant])}")


def _is_meant_as_general(quantizer: object) -> bool:
    own = [name for name in (*_ARGUMENTS["general"], "block_length") if name not in ("encode", "group_local")]
    return any(_has(quantizer, name) or _find_mistyped(quantizer, name) for name in own)


def _find_faults(quantizer: object, kind: Kind) -> Iterator[str]:
    for name, count in _ARGUMENTS[kind].items():
        if not _has(quantizer, name):
            yield f"lacks {name}(){_hint(quantizer, name)}"
        elif not _takes(getattr(quantizer, name), count):
            yield f"has {name} that cannot be called with {count} argument{'' if count == 1 else 's'}"
    for name in _ATTRIBUTES[kind]:
        if not _has(quantizer, name):
            yield f"lacks {name}{_hint(quantizer, name)}"
        elif name == "group_local" and not isinstance(getattr(quantizer, name), bool):
            yield f"has group_local={getattr(quantizer, name)!r}, which is not a bool"
        elif name == "block_length" and not _is_length(getattr(quantizer, name)):
            yield f"has block_length={getattr(quantizer, name)!r}, which is not a number of tokens from 1 up"


def _has(quantizer: object, name: str) -> bool:
    return hasattr(quantizer, name)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _takes(method: object, count: int) -> bool:
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a method of a native extension has no signature
        return True
    return True


def _hint(quantizer: object, name: str) -> str:
    found = _find_mistyped(quantizer, name)
    return f" (is {found} meant for it?)" if found else ""


def _find_mistyped(quantizer: object, name: str) -> str | None:
    known = {one for kind in _NAMES for one in (*_ARGUMENTS[kind], *_ATTRIBUTES[kind])}
    others = [one for one in dir(quantizer) if not one.startswith("_") and one not in known]
    plain = {one.replace("_", "").lower(): one for one in others}
    near = difflib.get_close_matches(name.replace("_", ""), plain, n=1, cutoff=_ALIKE)
    return plain[near[0]] if near else None
