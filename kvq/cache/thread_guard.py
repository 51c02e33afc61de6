"""Notices two threads that use one cache at the same time.

A cache may wander from thread to thread, one forward after the other. It does not survive a forward that another
thread interrupts: the layers would hold the tokens of both. It must not know what a cache or a layer is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvq.errors import CacheStateError


class ThreadGuard:
    """Belongs to one cache; a copy of the cache gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._first_layer = -1

    def enter(self, layer_idx: int, is_in_step: Callable[[], bool]) -> None:
        """Keep other threads out from now until `leave`, which has to follow.

        Args:
            layer_idx: the layer that is updated.
            is_in_step: returns whether all layers that hold tokens hold equally many, as between two forwards; asked
                only where the thread is another one than at the last update.

        Raises:
            CacheStateError: another thread is in the middle of an update or of a forward.
        """
        if not self._lock.acquire(blocking=False):
            raise CacheStateError(_refusal(layer_idx))
        try:
            if self._thread is not None and threading.get_ident() != self._thread:
                self._check_turn(layer_idx, is_in_step)
        except BaseException:
            self._lock.release()
            raise

    def leave(self, layer_idx: int, *, succeeded: bool) -> None:
        """Let others in; where the update succeeded, the forward is this thread's."""
        if succeeded:
            self._first_layer = layer_idx if self._thread is None else min(layer_idx, self._first_layer)
            self._thread = threading.get_ident()
        self._lock.release()

    def _check_turn(self, layer_idx: int, is_in_step: Callable[[], bool]) -> None:
        if layer_idx > self._first_layer or not is_in_step():
            raise CacheStateError(_refusal(layer_idx))

    def __reduce__(self) -> tuple[type[ThreadGuard], tuple[()]]:
        return ThreadGuard, ()


def _refusal(layer_idx: int) -> str:
    return (
        f"layer {layer_idx}: another thread is using this cache in the middle of a forward; "
        "give each thread a cache of its own (cache.fork() shares the stored tokens)"
    )
