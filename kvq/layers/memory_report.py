"""The report on the bytes that a cache holds, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from kvq.plugin_api.quantizer import Side
from kvq.text_table import TextTable
from kvq.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from rich.table import Table

USUAL_ROLES = ("packed", "window", "sinks")
"""Roles of tensors that have a column in every report."""
TEXT_WIDTH = 120
"""Characters of a line in `str` of a report."""


@dataclass(frozen=True)
class SideMemory:
    """Bytes of the keys or the values of one layer.

    Attributes:
        backend: name of the backend.
        nbits: configured bits per code.
        held_bytes: bytes in use by role: what `kvq.store.held` calls the tensors that a side holds.
        slack_bytes: allocated for future tokens, in chunks and window.
        elements: stored elements, B * H * stored tokens * D.
        chunk_bytes: all bytes of the chunks, slack included.
    """

    backend: str
    nbits: float
    held_bytes: Mapping[str, int] = field(hash=False)
    slack_bytes: int
    elements: int
    chunk_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Codes and metadata of stored tokens."""
        return self.held_bytes.get("packed", 0)

    @property
    def window_bytes(self) -> int:
        """Newest tokens in full precision."""
        return self.held_bytes.get("window", 0)

    @property
    def sink_bytes(self) -> int:
        """First tokens in full precision."""
        return self.held_bytes.get("sinks", 0)

    @property
    def constant_bytes(self) -> int:
        """Codebooks, rotations and the like."""
        return self.held_bytes.get("constants", 0)

    @property
    def index_bytes(self) -> int:
        """The order of the batch, where it was changed."""
        return self.held_bytes.get("order", 0)

    @property
    def survivor_bytes(self) -> int:
        """The tokens that crops left of groups that they cut, as they were then."""
        return self.held_bytes.get("cropped", 0)

    @property
    def total_bytes(self) -> int:
        """All bytes of this side."""
        return sum(self.held_bytes.values()) + self.slack_bytes

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
    """The bytes that a cache holds, beside those that `DynamicCache` would hold.

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
    def index_bytes(self) -> int:
        """The order of the batch, where it was changed."""
        return self._sum("index_bytes")

    @property
    def cropped_bytes(self) -> int:
        """The tokens that crops left of groups that they cut, as they were then."""
        return self._sum("survivor_bytes")

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
        """Lay out the report, layers with equal figures in one row; the bytes of a row add up to its total."""
        title = (
            f"{format_bytes(self.total_bytes)} held, {format_bytes(self.full_precision_bytes)} in full precision: "
            f"{format_ratio(self.compression)}"
        )
        roles = self._roles()
        numbers = ("tokens", *roles, "slack", "total")
        rows = []
        for first, last, layer in _runs(self.layers):
            name = str(first) if first == last else f"{first}-{last}"
            sides = [_side_text(side, layer.kind) for side in (layer.key, layer.value)]
            parts = [*_texts(layer, roles), format_bytes(layer.total_bytes)]
            rows.append((name, *sides, str(layer.tokens), *parts))
        if self.shared_bytes:
            rows.append(("shared", *[""] * (len(numbers) + 1), f"-{format_bytes(self.shared_bytes)}"))
        return TextTable(title, ("layers", "keys", "values", *numbers), tuple(rows), right=frozenset(numbers))

    def _roles(self) -> tuple[str, ...]:
        """Return the roles that have a column: the usual ones, and every other one in which a layer holds something."""
        held = [role for side in self._sides() for role, count in side.held_bytes.items() if count]
        return tuple(dict.fromkeys([*USUAL_ROLES, *held]))

    def _sides(self) -> Iterator[SideMemory]:
        yield from (side for layer in self.layers for side in (layer.key, layer.value) if side is not None)

    def _sum(self, name: str) -> int:
        return sum(getattr(side, name) for side in self._sides())

    def _effective_bits(self, name: Side) -> float | None:
        sides = [side for layer in self.layers if (side := getattr(layer, name)) is not None]
        elements = sum(side.elements for side in sides)
        return 8 * sum(side.chunk_bytes for side in sides) / elements if elements else None


def _texts(layer: LayerMemory, roles: Iterable[str]) -> list[str]:
    """Return the bytes of a layer in each role, then its slack, as text."""
    sides = [side for side in (layer.key, layer.value) if side is not None]
    if not sides:
        return ["-"] * (len(tuple(roles)) + 1)
    held = [sum(side.held_bytes.get(role, 0) for side in sides) for role in roles]
    return [format_bytes(count) for count in (*held, sum(side.slack_bytes for side in sides))]


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
