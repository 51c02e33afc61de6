"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

_POWERS = {"B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}}
_POWERS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}


def format_bytes(count: int) -> str:
    """Return a number of bytes in the largest binary unit up to GiB that leaves at least one."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def format_ratio(compression: float) -> str:
    """Return how many times smaller something became, or larger where the ratio is below 1."""
    return f"{compression:.2f}x smaller" if compression >= 1 else f"{1 / compression:.2f}x larger"


def parse_bytes(text: str) -> int:
    """Read a number of bytes with its unit, e.g. `24GiB`, `80 GB` or `1.5TiB`.

    Raises:
        ValueError: the text is not a size, or is less than one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text, re.ASCII)
    factor = _POWERS.get(found[2].upper()) if found else None
    count = int(float(found[1]) * factor) if found and factor else 0
    if count < 1:
        units = "B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB or TB (powers of 1000)"
        raise ValueError(f"{text!r} is not a size in bytes; write a number above 0 and one of {units}, e.g. 24GiB")
    return count
