"""Counting the bytes that the layers of a cache hold, from the storages that exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq.config import ResolvedSide
from kvq.layers.memory_report import LayerMemory, MemoryReport, SideMemory
from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api.quantizer import Side
from kvq.store.held import Held
from kvq.store.side import LayerSide


def report_memory(layers: Iterable[object]) -> MemoryReport:
    """Count what the layers of a cache hold.

    Args:
        layers: quantized layers and layers of transformers.
    """
    storages: dict[int, int] = {}
    entries = []
    for index, layer in enumerate(layers):
        entry, found = _count_quantized(index, layer) if isinstance(layer, KVQLayer) else _count_other(index, layer)
        entries.append(entry)
        storages |= found
    total = sum(storages.values())
    return MemoryReport(tuple(entries), total, sum(entry.total_bytes for entry in entries) - total)


def _count_quantized(index: int, layer: KVQLayer) -> tuple[LayerMemory, dict[int, int]]:
    """Return the entry of a layer and the bytes of its storages by address."""
    sides: dict[Side, SideMemory] = {}
    found: dict[int, int] = {}
    for name, side in layer.sides():
        held = list(side.held())
        sides[name] = _describe_side(layer.settings.side(name), side, held)
        found |= _storages(one.tensor for one in held)
    carried = {} if layer.carried is None else _storages(_tensors_of(vars(layer.carried).values()))
    found |= carried
    seen = layer.held_length - layer.hidden_length
    entry = LayerMemory(
        index,
        type(layer).__name__,
        layer.get_seq_length(),
        sum(found.values()),
        sum(_full_precision_bytes(side, seen) for _, side in layer.sides()) + sum(carried.values()),
        key=sides.get("key"),
        value=sides.get("value"),
        attention=layer.kernel_cache.last_reader,
        passed_over=dict(layer.kernel_cache.passed_over),
    )
    return entry, found


def _count_other(index: int, layer: object) -> tuple[LayerMemory, dict[int, int]]:
    found = _storages(_tensors_of(vars(layer).values()))
    tokens = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
    held = sum(found.values())
    return LayerMemory(index, type(layer).__name__, tokens, held, held), found


def _describe_side(settings: ResolvedSide, side: LayerSide, held: Iterable[Held]) -> SideMemory:
    used: dict[str, int] = {}
    allocated: dict[str, int] = {}
    for role, tensor, share in held:
        size = tensor.untyped_storage().nbytes()
        used[role] = used.get(role, 0) + round(share * size)
        allocated[role] = allocated.get(role, 0) + size
    return SideMemory(
        backend=settings.backend.name,
        nbits=settings.nbits,
        held_bytes=used,
        slack_bytes=sum(allocated.values()) - sum(used.values()),
        elements=side.store.batch_size * side.store.num_heads * side.store.length * side.window.buffer.shape[3],
        chunk_bytes=allocated.get("packed", 0),
    )


def _tensors_of(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if hasattr(value, "__tensor_flatten__"):  # a subclass that has its data in other tensors
            yield from _tensors_of(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_of(value)
        elif isinstance(value, dict):
            yield from _tensors_of(value.values())


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of the distinct storages of tensors by address; on the meta device none has an address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr() or storage._cdata: storage.nbytes() for storage in storages}


def _full_precision_bytes(side: LayerSide, tokens: int) -> int:
    window = side.window.buffer
    return window.shape[0] * window.shape[1] * tokens * window.shape[3] * window.element_size()
