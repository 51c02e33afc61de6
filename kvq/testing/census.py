"""The bytes that the process holds, counted from outside: no object under test is asked.

Tensors are found by walking the garbage collector's lists, no matter which object holds them; arrays of NumPy, bytes,
lists and all else that Python allocates are counted by `tracemalloc`.
"""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Census:
    """Counts the memory allocated since it began; see `begin_census`."""

    def __init__(self) -> None:
        known = list(_find_holders())
        self._before = dict(_storages(known))
        # An object that the walks leave out may still be resized, and then hold more than before.
        self._known = [weakref.ref(thing) for thing in known]
        self._traced = tracemalloc.get_traced_memory()[0]

    def count(self) -> int:
        """Return the bytes of new, live tensors plus Python's own new allocations."""
        gc.collect()
        python_bytes = max(0, tracemalloc.get_traced_memory()[0] - self._traced)
        new = list(_find_holders())
        old = [thing for reference in self._known if (thing := reference()) is not None]
        found = dict(_storages([*new, *old]))
        return python_bytes + sum(size for key, size in found.items() if key not in self._before)


@contextmanager
def begin_census() -> Iterator[Census]:
    """Give a census that begins now; its walks leave out all objects that exist already, which makes them quick."""
    gc.collect()
    was_tracing, was_frozen = tracemalloc.is_tracing(), gc.get_freeze_count() > 0
    if not was_tracing:
        tracemalloc.start(1)
    try:
        census = Census()
        gc.freeze()
        yield census
    finally:
        if not was_frozen:
            gc.unfreeze()
        if not was_tracing:
            tracemalloc.stop()


def _find_holders() -> Iterator[Any]:
    """Yield the objects that hold a storage, among all that the garbage collector would look at."""
    known: dict[int, bool] = {}  # by the address of a type, which need not be hashable: half a million objects have few
    for thing in gc.get_objects():
        # `type`, since isinstance would wake up lazy module attributes of libraries.
        kind = type(thing)
        holds = known.get(id(kind))
        if holds is None:
            holds = known[id(kind)] = _holds_storage(kind)
        if holds:
            yield thing


def _holds_storage(kind: type) -> bool:
    # A tensor subclass that is made of other tensors has no storage of its own.
    if issubclass(kind, torch.Tensor):
        return not hasattr(kind, "__tensor_flatten__")
    return issubclass(kind, torch.UntypedStorage)


def _storages(things: Iterable[Any]) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield device, address and bytes of the storages of tensors."""
    for thing in things:
        try:
            storage = thing if isinstance(thing, torch.UntypedStorage) else thing.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a subclass without data of its own
            continue
        if storage.device.type != "meta":
            yield (str(storage.device), storage.data_ptr()), storage.nbytes()
