"""Files with one thing wrong: every value of the header in turn, the table of tensors, lengths and bytes.

It knows the format from its description, not from the code that reads it: the checksum is computed here anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

ZEROS = "0" * 64
STRANGE = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    63,
    2**31,
    2**62,
    2**200,
    0.5,
    1e300,
    "",
    "x",
    "\x00",
    "float32",
    "F32",
    [],
    {},
    [[]],
)


@dataclass
class Mutation:
    """Bytes that are no good file, or another one.

    Attributes:
        path: what was changed.
        build: returns the bytes.
        signed: whether the checksum was made to fit.
    """

    path: tuple
    build: Callable[[], bytes]
    signed: bool


class Image:
    """A file taken apart."""

    def __init__(self, data):
        length = int.from_bytes(data[:8], "little")
        self.table = json.loads(data[8 : 8 + length])
        self.facts = self.table.pop("__metadata__")
        self.cache = json.loads(self.facts.pop("cache"))
        self.data = data[8 + length :]

    def build(self, *, sign):
        """Put it together again; without `sign` the checksum stays the one that it had."""
        old = self.facts["checksum"]
        facts = {**self.facts, "checksum": ZEROS if sign else old, "cache": json.dumps(self.cache)}
        header = json.dumps({"__metadata__": facts, **self.table}).encode()
        if sign:
            digest = hashlib.sha256(len(header).to_bytes(8, "little") + header + self.data).hexdigest()
            header = header.replace(ZEROS.encode(), digest.encode())
        return len(header).to_bytes(8, "little") + header + self.data


def places(value, path=()):
    """Yield the path of every value within a JSON value, containers included."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def at(value, path):
    for step in path:
        value = value[step]
    return value


def variants(value):
    """Yield what may stand in place of a value."""
    yield from STRANGE
    if type(value) is int:
        yield from (value + 1, value - 1, value * 2)
    if isinstance(value, str):
        yield from (value[:-1], f"{value}x")
    if isinstance(value, list):
        yield from (value[:-1], [*value, *value[-1:]], value[::-1])
    if isinstance(value, dict):
        yield from ({**value, "x": 1}, *({k: v for k, v in value.items() if k != name} for name in value))


def by_field(data):
    """Yield mutations of each header value, offset, shape, dtype and name; unsigned and signed."""
    pristine = Image(data)
    for part in ("cache", "table", "facts"):
        for path in places(getattr(pristine, part)):
            old = at(getattr(pristine, part), path)
            for new in variants(old):
                if new == old and type(new) is type(old):
                    continue
                for sign in (False,) if path == ("checksum",) else (False, True):
                    yield Mutation((part, *path), partial(_replaced, data, part, path, new, sign), signed=sign)


def _replaced(data, part, path, new, sign):
    image = Image(data)
    at(getattr(image, part), path[:-1])[path[-1]] = new
    return image.build(sign=sign)


def by_name(data):
    """Yield mutations that lose, rename or exchange entries."""
    names = list(Image(data).table)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        for change in ("lose", "rename", "exchange"):
            for sign in (False, True):
                yield Mutation(("table", change, name), partial(_renamed, data, change, name, other, sign), signed=sign)
    for key in ("format", "format_version"):
        yield Mutation(("facts", "lose", key), partial(_lost_fact, data, key), signed=True)


def _renamed(data, change, name, other, sign):
    image = Image(data)
    entry = image.table.pop(name)
    if change == "rename":
        image.table["layers.9.key.window"] = entry
    if change == "exchange":
        image.table[name], image.table[other] = image.table[other], entry
    return image.build(sign=sign)


def _lost_fact(data, key):
    image = Image(data)
    del image.facts[key]
    return image.build(sign=True)


def by_byte(data, count, seed):
    """Yield truncations, additions, other lengths of the header, and changed bytes."""
    rng = random.Random(seed)  # noqa: S311  # nothing secret

    def changed(kind, result):
        return Mutation(("bytes", kind), lambda: result, signed=False)

    for _ in range(count):
        place = rng.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << rng.randrange(8)])
        yield changed("flip", data[:place] + flipped + data[place + 1 :])
        yield changed("cut", data[: rng.randrange(len(data))])
        yield changed("insert", data[:place] + bytes([rng.randrange(256)]) + data[place:])
        yield changed("lose", data[:place] + data[place + 1 :])
    for length in (0, 1, 2, 8, len(data) - 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1):
        yield changed("length", length.to_bytes(8, "little") + data[8:])
    for size in (0, 1, 7, 8, 9):
        yield changed("size", data[:size])
    for added in (b"\0", b"x" * 100):
        yield changed("added", data + added)


def of_no_kind():
    """Yield files that are nothing of ours at all."""
    headers = (
        b"[]", b"{}", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"a":1,"a":2}', b'{"a":NaN}',
        b'{"__metadata__":{}}', b'{"__metadata__":{"format":"pt"}}', b'{"__metadata__":{"format":1}}', b"9" * 5000,
    )  # fmt: skip
    files = [len(header).to_bytes(8, "little") + header for header in headers]
    for data in (*files, b"PK\x03\x04" + bytes(100), b"\x80\x04\x95" + bytes(100), b"GGUF" + bytes(100)):
        yield Mutation(("foreign", data[:30]), partial(bytes, data), signed=False)
