"""One cache of the tokens of several, as if their texts stood behind each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvq.cache.key_rotation import KeyRotation
from kvq.errors import CacheStateError, StatesError
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import carrier_of


class TextCache(Protocol):
    """What is needed of a cache to put its tokens behind those of another: `KVQ` has it."""

    layers: list[Any]
    token_ids: torch.Tensor | None

    @property
    def has_padding(self) -> bool:
        """Whether a row begins with left padding."""
        ...

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        ...

    def materialize(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer, `[B, H, T, D]`."""
        ...

    def fork(self) -> Any:
        """Return an independent cache with the same tokens."""
        ...


Merged = TypeVar("Merged", bound=TextCache)


def merge(caches: Sequence[Merged], model: PreTrainedModel) -> Merged:
    """Return a cache of the tokens of several; see `KVQ.concatenate`."""
    _check(caches)
    rotation = KeyRotation(model)
    merged: Merged = caches[0].fork()
    for other in caches[1:]:
        _append(merged, other, rotation)
    merged.token_ids = _join_ids(caches)
    return merged


def _join_ids(caches: Sequence[TextCache]) -> torch.Tensor | None:
    """Return the tokens of all caches, where each knows its own."""
    found = []
    for cache in caches:
        ids, length = cache.token_ids, cache.get_seq_length()
        if ids is None or ids.shape[1] < length:
            return None
        found.append(ids[:, :length])
    return torch.cat(found, dim=1)


def _append(merged: TextCache, other: TextCache, rotation: KeyRotation) -> None:
    distance = merged.get_seq_length()
    for index, layer in enumerate(merged.layers):
        keys, values = other.materialize(index)
        keys = rotation.shifted(keys, distance)
        if isinstance(layer, KVQLayer):
            held = layer.side("key").window.buffer
            layer.check_states(keys.to(held.device), values.to(held.device))
            layer.add(keys.to(held.device), values.to(held.device), packed=True)
        else:
            layer.update(keys.to(layer.keys.device), values.to(layer.values.device))


def _check(caches: Sequence[TextCache]) -> None:
    if not caches:
        raise StatesError("there are no caches to concatenate")
    for place, cache in enumerate(caches):
        _check_one(f"cache {place}", cache)
    shapes = [(len(cache.layers), _count_rows(cache)) for cache in caches]
    if len(set(shapes)) > 1:
        told = ", ".join(f"{layers} layers and {rows} rows" for layers, rows in shapes)
        raise StatesError(f"the caches differ: they hold {told}")


def _check_one(name: str, cache: TextCache) -> None:
    if not cache.get_seq_length():
        raise CacheStateError(f"{name} holds no tokens; run the model with it first")
    if cache.has_padding:
        raise CacheStateError(f"{name} has left padding, which would stand in the middle; make one cache for each row")
    if any(getattr(layer, "evicted_length", 0) for layer in cache.layers):
        raise CacheStateError(f"{name} has evicted tokens; concatenate first, and evict then")
    other = [
        index
        for index, layer in enumerate(cache.layers)
        if type(layer) not in (KVQLayer, DynamicLayer) or carrier_of(layer) is not layer
    ]
    if other:
        raise CacheStateError(
            f"{name}: layers {other} do not hold the states of all their tokens, or more than these (sliding or linear "
            "attention, indexers), so none can be put behind others"
        )
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if len(lengths) > 1:
        raise CacheStateError(
            f"{name} has layers of {' and '.join(map(str, sorted(lengths)))} tokens; a forward was cut short, so it is "
            "not of one text"
        )


def _count_rows(cache: TextCache) -> int:
    return cache.materialize(0)[0].shape[0]
