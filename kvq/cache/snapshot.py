"""A cache as it was at one token, to go back to any number of times.

A crop cannot go back where a layer carries a sum of all tokens, or has forgotten what came before its window. A
snapshot holds the layers as a fork does: quantized tokens are shared until one side changes its own, states of linear
attention are copied.
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers.cache_utils import Cache

from kvq.errors import CacheStateError

Kept = TypeVar("Kept", bound="Restorable")


class CacheSnapshot:
    """What a cache held at one moment; nothing that is done to the cache later changes it.

    Args:
        held: a fork of the cache, which nobody else has.
    """

    def __init__(self, held: Restorable) -> None:
        self._held = held

    def __repr__(self) -> str:
        return f"CacheSnapshot({len(self)} tokens)"

    def __len__(self) -> int:
        """Return the tokens held."""
        length: int = self._held.get_seq_length()
        return length

    def fork(self) -> Restorable:
        """Return a cache of its own with these tokens."""
        return self._held.fork()


class Restorable(Cache):
    """A cache that can be put back to what it was."""

    config: Any
    _model_config: Any

    def fork(self: Kept) -> Kept:
        """Return an independent cache with the same tokens."""
        raise NotImplementedError

    def snapshot(self) -> CacheSnapshot:
        """Return what the cache holds now, for `restore`.

        It shares the quantized tokens, as a fork does, so it costs an open chunk and the window of each layer once the
        cache has grown, and a copy of what layers of linear attention carry.
        """
        return CacheSnapshot(self.fork())

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Hold again what the cache held when the snapshot was taken; the snapshot can be used again.

        Args:
            snapshot: of this cache, of a fork of it, or of another cache with the same configuration and model.

        Raises:
            CacheStateError: the snapshot is of a cache for another model or with another configuration.
        """
        held = snapshot.fork()
        if type(held) is not type(self) or held.config != self.config or held._model_config != self._model_config:
            raise CacheStateError(
                f"restore({snapshot!r}): it was taken of a cache with another configuration or for another model; "
                "take one of this cache, cache.snapshot()"
            )
        self._take(held)

    def _take(self, held: Any) -> None:
        """Take over the contents of another cache, which nobody else has."""
        raise NotImplementedError
