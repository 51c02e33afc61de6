"""The form of a configuration, checked before any field: keys are names, and nesting is no deeper than a person writes.

A YAML file can express a mapping that holds itself, a few lines that mean billions of values, and keys that are no
strings. The code that reads single fields would recurse, run out of memory or raise its own errors there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvq.config.faults import shown
from kvq.errors import Fault

MAX_DEPTH = 20
"""How deep mappings and lists may be nested."""
MAX_VALUES = 10_000
"""Most values in all; those that an alias repeats count each time."""

Path = tuple[str | int, ...]


def find_strange_values(fields: Mapping[str, object]) -> list[Fault]:
    """Return the problem with a configuration's form, or None; the meaning of its fields does not matter.

    Args:
        fields: the configuration; the keys of `layers` are left to that field, which takes numbers as well.
    """
    faults: list[Fault] = []
    for count, (path, value) in enumerate(_walk(fields, ())):
        if count >= MAX_VALUES:
            return [Fault(path[:1], f"holds more than {MAX_VALUES:,} values; a configuration needs some dozens")]
        if len(path) > MAX_DEPTH:
            problem = f"mappings and lists lie more than {MAX_DEPTH} deep, or hold themselves; flatten them"
            return [Fault(path[:3], problem)]
        if isinstance(value, Mapping) and path != ("layers",):
            strange = [key for key in value if not isinstance(key, str)]
            if strange:
                problem = f"{shown(strange[0])} is not accepted as a key: keys are names; put it in quotes if it is one"
                faults.append(Fault(path, problem))
    return faults


def _walk(value: object, path: Path) -> Iterator[tuple[Path, object]]:
    """Yield every value, the outermost first, without recursion."""
    waiting: list[tuple[Path, object]] = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        if isinstance(value, Mapping):
            waiting += [((*path, _step(key)), item) for key, item in value.items()][::-1]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, index), item) for index, item in enumerate(value)][::-1]


def _step(key: object) -> str | int:
    return key if isinstance(key, str) else shown(key)
