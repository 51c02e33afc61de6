"""What a cache holds in bytes, counted from the storages that exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api.quantizer import Side
from kvq.store.side import LayerSide
from kvq.text_table import TextTable
from kvq.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from rich.table import Table

TEXT_WIDTH = 120
"""Characters of a line in `str` of a report."""


@dataclass(frozen=True)
class SideMemory:
    """Bytes of the keys or the values of one layer.

    Attributes:
        backend: name of the backend.
        nbits: configured bits per code.
        packed_bytes: codes and metadata of stored tokens.
        window_bytes: newest tokens in full precision.
        sink_bytes: first tokens in full precision.
        slack_bytes: allocated for future tokens, in chunks and window.
        constant_bytes: codebooks, rotations and the like.
        elements: stored elements, B * H * stored tokens * D.
        chunk_bytes: all bytes of the chunks, slack included.
        index_bytes: the order of the batch, where it was changed.
        survivor_bytes: what crops left of groups that they cut, kept from being quantized a third time.
    """

    backend: str
    nbits: float
    packed_bytes: int
    window_bytes: int
    sink_bytes: int
    slack_bytes: int
    constant_bytes: int
    elements: int
    chunk_bytes: int
    index_bytes: int = 0
    survivor_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes of this side."""
        exact = self.window_bytes + self.sink_bytes + self.survivor_bytes
        return self.packed_bytes + exact + self.slack_bytes + self.constant_bytes + self.index_bytes

    @property
    def effective_bits(self) -> float | None:
        """Stored bits per stored element: codes, metadata and the slack of the chunks; None before the first flush."""
        return 8 * self.chunk_bytes / self.elements if self.elements else None


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer.

    Attributes:
        layer_idx: index of the layer.
        kind: the class of the layer.
        tokens: tokens held.
        key, value: the two sides, or None for a layer in full precision.
        attention: how the latest attention read the layer: the name of a kernel, or why it was materialized; empty
            before that, and where another attention than ours is active.
        passed_over: the kernels that would have come before that one, each with the reason against it.
        total_bytes: bytes of the distinct storages that the layer holds.
        full_precision_bytes: bytes that the same tokens take in `DynamicCache`.
    """

    layer_idx: int
    kind: str
    tokens: int
    total_bytes: int
    full_precision_bytes: int
    key: SideMemory | None = None
    value: SideMemory | None = None
    attention: str = ""
    passed_over: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class MemoryReport:
    """What a cache holds against what `DynamicCache` would hold.

    Attributes:
        layers: one entry a layer.
        total_bytes: bytes of the distinct storages of all layers; one that several layers share counts once.
        shared_bytes: bytes that more than one layer holds and that are counted once.
    """

    layers: tuple[LayerMemory, ...]
    total_bytes: int
    shared_bytes: int = field(default=0)

    @property
    def full_precision_bytes(self) -> int:
        """Bytes of the same tokens in `DynamicCache`."""
        return sum(layer.full_precision_bytes for layer in self.layers)

    @property
    def compression(self) -> float:
        """How many times smaller the cache is than `DynamicCache`; 1.0 while it is empty."""
        return self.full_precision_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def attention(self) -> tuple[str, ...]:
        """How the latest attention read the layers: the different answers of `LayerMemory.attention`, sorted.

        Not part of the table, which says the same on every machine.
        """
        return tuple(sorted({layer.attention for layer in self.layers if layer.attention}))

    @property
    def passed_over(self) -> dict[str, str]:
        """Why the latest attention did not use a kernel that would have come first: the reasons by kernel.

        Of layers with different reasons the first counts. Not part of the table either.
        """
        reasons: dict[str, str] = {}
        for layer in self.layers:
            reasons = {**layer.passed_over, **reasons}
        return reasons

    @property
    def packed_bytes(self) -> int:
        """Codes and metadata of stored tokens."""
        return self._sum("packed_bytes")

    @property
    def window_bytes(self) -> int:
        """Newest tokens in full precision."""
        return self._sum("window_bytes")

    @property
    def sink_bytes(self) -> int:
        """First tokens in full precision."""
        return self._sum("sink_bytes")

    @property
    def slack_bytes(self) -> int:
        """Allocated for future tokens."""
        return self._sum("slack_bytes")

    @property
    def constant_bytes(self) -> int:
        """Codebooks, rotations and the like."""
        return self._sum("constant_bytes")

    @property
    def effective_bits_key(self) -> float | None:
        """Stored bits per stored element of the keys, slack of the chunks included; None before the first flush."""
        return self._effective_bits("key")

    @property
    def effective_bits_value(self) -> float | None:
        """The same for the values."""
        return self._effective_bits("value")

    def __str__(self) -> str:
        return self._table().draw(TEXT_WIDTH)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def to_table(self) -> Table:
        """Return the report as a table of rich, which comes with the extra `cli`.

        Raises:
            MissingExtraError: rich is not installed.
        """
        return self._table().to_rich()

    def _table(self) -> TextTable:
        """Lay out the report, layers with equal figures in one row."""
        title = (
            f"{format_bytes(self.total_bytes)} held, {format_bytes(self.full_precision_bytes)} in full precision: "
            f"{format_ratio(self.compression)}"
        )
        numbers = ("tokens", "packed", "window", "sinks", "slack", "total")
        rows = []
        for first, last, layer in _runs(self.layers):
            name = str(first) if first == last else f"{first}-{last}"
            parts = [
                format_bytes(sum(getattr(side, part) for side in (layer.key, layer.value) if side is not None))
                for part in ("packed_bytes", "window_bytes", "sink_bytes", "slack_bytes")
            ]
            if layer.key is None:
                parts = ["-"] * 4
            sides = [_side_text(side, layer.kind) for side in (layer.key, layer.value)]
            rows.append((name, *sides, str(layer.tokens), *parts, format_bytes(layer.total_bytes)))
        if self.shared_bytes:
            rows.append(("shared", "", "", "", "", "", "", "", f"-{format_bytes(self.shared_bytes)}"))
        return TextTable(title, ("layers", "keys", "values", *numbers), tuple(rows), right=frozenset(numbers))

    def _sum(self, name: str) -> int:
        return sum(getattr(side, name) for layer in self.layers for side in (layer.key, layer.value) if side)

    def _effective_bits(self, name: Side) -> float | None:
        sides = [side for layer in self.layers if (side := getattr(layer, name)) is not None]
        elements = sum(side.elements for side in sides)
        return 8 * sum(side.chunk_bytes for side in sides) / elements if elements else None


def report_memory(layers: Iterable[object]) -> MemoryReport:
    """Count what the layers of a cache hold.

    Args:
        layers: quantized layers and layers of transformers.
    """
    storages: dict[int, int] = {}
    entries = []
    for index, layer in enumerate(layers):
        found = dict(_storages(_layer_tensors(layer)))
        entries.append(_describe(index, layer, sum(found.values())))
        storages |= found
    total = sum(storages.values())
    return MemoryReport(tuple(entries), total, sum(entry.total_bytes for entry in entries) - total)


def _describe(index: int, layer: object, held: int) -> LayerMemory:
    kind = type(layer).__name__
    if not isinstance(layer, KVQLayer):
        tokens = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
        return LayerMemory(index, kind, tokens, held, held)
    sides = {name: _describe_side(layer, name, side) for name, side in layer.sides()}
    full_precision = sum(_full_precision_bytes(side, layer.get_seq_length()) for _, side in layer.sides())
    return LayerMemory(
        index,
        kind,
        layer.get_seq_length(),
        held,
        full_precision,
        key=sides.get("key"),
        value=sides.get("value"),
        attention=layer.kernel_cache.last_reader,
        passed_over=dict(layer.kernel_cache.passed_over),
    )


def _describe_side(layer: KVQLayer, name: Side, side: LayerSide) -> SideMemory:
    settings = layer.settings.side(name)
    chunk_bytes = packed = 0
    for tensor, share in side.store.tensors():
        chunk_bytes += _nbytes(tensor)
        packed += round(share * _nbytes(tensor))
    window = side.window.buffer
    window_capacity = _nbytes(window)
    window_bytes = window_capacity * side.window.length // max(1, window.shape[2])
    return SideMemory(
        backend=settings.backend.name,
        nbits=settings.nbits,
        packed_bytes=packed,
        window_bytes=window_bytes,
        sink_bytes=_nbytes(side.sinks.states) if side.sinks.states is not None else 0,
        slack_bytes=chunk_bytes - packed + window_capacity - window_bytes,
        constant_bytes=sum(_nbytes(tensor) for tensor in side.quantizer.constants().values()),
        elements=side.store.batch_size * side.store.num_heads * side.store.length * _head_dim(side),
        chunk_bytes=chunk_bytes,
        index_bytes=sum(_nbytes(rows) for rows in side.store.row_indices()),
        survivor_bytes=sum(_nbytes(group.states) for group in side.survivors.groups),
    )


def _layer_tensors(layer: object) -> Iterator[torch.Tensor]:
    if isinstance(layer, KVQLayer):
        for _, side in layer.sides():
            yield from (tensor for tensor, _ in side.store.tensors())
            yield from side.store.row_indices()
            yield from side.quantizer.constants().values()
            yield side.window.buffer
            yield from (group.states for group in side.survivors.groups)
            if side.sinks.states is not None:
                yield side.sinks.states
        return
    yield from _tensors_of(vars(layer).values())


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


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # On the meta device, where plans are made, no storage has an address.
        yield storage.data_ptr() or storage._cdata, storage.nbytes()


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _head_dim(side: LayerSide) -> int:
    return side.window.buffer.shape[3]


def _full_precision_bytes(side: LayerSide, tokens: int) -> int:
    window = side.window.buffer
    return window.shape[0] * window.shape[1] * tokens * window.shape[3] * window.element_size()


def _side_text(side: SideMemory | None, kind: str) -> str:
    if side is None:
        return kind
    bits = side.effective_bits
    return f"{side.backend} {side.nbits:g} bit" + (f" ({bits:.2f})" if bits is not None else "")


def _runs(layers: tuple[LayerMemory, ...]) -> Iterator[tuple[int, int, LayerMemory]]:
    """Yield runs of neighbouring layers with equal figures as first index, last index and one of them."""
    start = 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or not _is_like(layers[stop], layers[start]):
            yield layers[start].layer_idx, layers[stop - 1].layer_idx, layers[start]
            start = stop


def _is_like(one: LayerMemory, other: LayerMemory) -> bool:
    return (one.kind, one.tokens, one.total_bytes, one.key, one.value) == (
        other.kind,
        other.tokens,
        other.total_bytes,
        other.key,
        other.value,
    )
