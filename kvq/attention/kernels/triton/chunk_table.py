"""Where the chunks of a layer lie on the device, in tables that the Triton programs read.

They are made again when the store changes, at a flush: between flushes a step uploads nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        addresses: int64 `[chunks, 8]`: three code planes, scale, mid, exponent, capacity in blocks, rows; 0: absent.
        blocks: int64 `[stored blocks, 2]`: the chunk of each block, and its place there.
    """

    segments: tuple[Segment, ...]
    addresses: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def of(cls, view: StoreView, device: torch.device) -> SideTable:
        """Return the table of the stored blocks."""
        widths = get_packed_format(view.codec).plane_widths
        addresses = [_addresses(segment, widths) for segment in view.segments]
        # On the processor by name, here and below: the caller may have set another default device.
        chunks = torch.arange(len(view.segments), device="cpu")
        used = torch.tensor([segment.used for segment in view.segments], device="cpu")
        places = torch.cat([torch.arange(segment.used, device="cpu") for segment in view.segments])
        blocks = torch.stack([chunks.repeat_interleave(used), places], 1)
        return cls(view.segments, _upload(torch.tensor(addresses, device="cpu"), device), _upload(blocks, device))


@dataclass(frozen=True)
class ChunkTable:
    """Both sides of a layer, and the numbers that the programs read with them.

    Attributes:
        key: table of the keys.
        value: table of the values.
        stored_length: int32 `[1]`, tokens in the store.
        starts: int32 `[B]`, position of the first sink of each row.
    """

    key: SideTable
    value: SideTable
    stored_length: torch.Tensor
    starts: torch.Tensor

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


def _addresses(segment: Segment, widths: Sequence[int]) -> list[int]:
    planes = [segment.parts[f"codes_{width}"].data_ptr() for width in widths]
    exponent = segment.parts.get("exponent")
    return [
        *planes,
        *[0] * (MAX_PLANES - len(planes)),
        segment.parts["scale"].data_ptr(),
        segment.parts["mid"].data_ptr(),
        0 if exponent is None else exponent.data_ptr(),
        segment.capacity,
        0 if segment.rows is None else segment.rows.data_ptr(),
    ]


def _starts(pair: PackedPair) -> Sequence[int]:
    starts = pair.key.sinks.starts
    batch = pair.key.like.shape[0]
    return starts if len(starts) == batch else (starts[0],) * batch


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
