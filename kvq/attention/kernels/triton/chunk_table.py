"""Where the chunks of a layer lie on the device, in tables that the Triton programs read.

They are made again when the store changes, at a flush: between flushes a step uploads nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvq.attention.handle import PackedPair
from kvq.plugin_api.packed_format import get_packed_format
from kvq.store.chunks import StoreView
from kvq.store.segments import Segment

DATA_NAME = "triton"
"""Under which the layer's `KernelCache` keeps its table."""
MAX_PLANES = 3


@dataclass(frozen=True)
class SideTable:
    """One side of a layer.

    Attributes:
        segments: the segments that the table was made from and points into, which it keeps alive.
        blocks: int64 `[stored blocks, 9]`, of the first row and head: the addresses of three code planes, scale, mid,
            exponent or units, token factors; the capacity of the chunk in blocks; the address of its rows. 0: absent.
    """

    segments: tuple[Segment, ...]
    blocks: torch.Tensor

    @classmethod
    def of(cls, view: StoreView, device: torch.device) -> SideTable:
        """Return the table of the stored blocks."""
        packed = get_packed_format(view.codec)
        names = [f"codes_{width}" for width in packed.plane_widths] + [""] * (MAX_PLANES - len(packed.plane_widths))
        names += ["scale", "mid", "units" if packed.has_units else "exponent", "factor"]
        return cls(view.segments, _upload(torch.cat([_blocks(segment, names) for segment in view.segments]), device))


@dataclass(frozen=True)
class ChunkTable:
    """Both sides of a layer, and the numbers that the programs read with them.

    Attributes:
        key: table of the keys.
        value: table of the values.
        stored_length: int32 `[1]`, tokens in the store.
        starts: int32 `[B]`, position of the first sink of each row.
        plans: what launches over this table share, by the kind of request.
    """

    key: SideTable
    value: SideTable
    stored_length: torch.Tensor
    starts: torch.Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict)

    def fits(self, pair: PackedPair) -> bool:
        """Return whether the store still has the segments that the table was made from."""
        return self.key.segments is pair.key.store.segments and self.value.segments is pair.value.store.segments


def get_chunk_table(pair: PackedPair, device: torch.device) -> ChunkTable:
    """Return the table of a layer, the one that it keeps where that still fits."""
    kept = pair.kernel_cache.kernel_data.get(DATA_NAME)
    if isinstance(kept, ChunkTable) and kept.fits(pair):
        return kept
    table = ChunkTable(
        SideTable.of(pair.key.store, device),
        SideTable.of(pair.value.store, device),
        _upload(torch.tensor([pair.key.store.length], dtype=torch.int32, device="cpu"), device),
        _upload(torch.tensor(_starts(pair), dtype=torch.int32, device="cpu"), device),
    )
    pair.kernel_cache.kernel_data[DATA_NAME] = table
    return table


def _blocks(segment: Segment, names: Sequence[str]) -> torch.Tensor:
    """Return the rows of a chunk's blocks; parts lie as `[B, H, blocks, ...]`."""
    parts = [segment.parts.get(name) for name in names]
    rows = 0 if segment.rows is None else segment.rows.data_ptr()
    # On the processor by name, here and below: the caller may have set another default device.
    first = torch.tensor(
        [*(0 if part is None else part.data_ptr() for part in parts), segment.capacity, rows], device="cpu"
    )
    sizes = [0 if part is None else part[0, 0, 0].numel() * part.element_size() for part in parts]
    return first + torch.arange(segment.used, device="cpu")[:, None] * torch.tensor([*sizes, 0, 0], device="cpu")


def _starts(pair: PackedPair) -> Sequence[int]:
    starts = pair.key.sinks.starts
    batch = pair.key.like.shape[0]
    return starts if len(starts) == batch else (starts[0],) * batch


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
