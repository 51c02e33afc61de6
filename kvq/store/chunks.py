"""Packed tokens of one side of one layer, in chunks that are never moved once they are full.

Owns growth, sharing between forks, batch order and truncation, for any `Quantizer`. It must not know what the parts
mean: it asks the quantizer for their layout and hands them back to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.guard import GuardedQuantizer
from kvq.store.origin import name_quantizer
from kvq.store.segments import Segment, copy_segments

MAX_CHUNK_LENGTH = 2048
"""Tokens in the largest chunk."""
ENCODE_ELEMENTS = 1 << 19
"""Elements quantized in one call, which bounds the temporaries to some MiB whatever is flushed."""
GROWTH_DIVISOR = 4
"""A chunk opened for future tokens holds at most this fraction of what is stored, which bounds the slack."""


def chunk_capacity(stored: int, wanted: int, block_length: int) -> int:
    """Return the capacity, in blocks, of the next chunk: a power of two.

    Args:
        stored: blocks already stored.
        wanted: blocks about to be appended; a chunk that they fill at once has no slack.
        block_length: tokens of a block.
    """
    largest = max(1, MAX_CHUNK_LENGTH // block_length)
    size = min(largest, max(1, stored // GROWTH_DIVISOR, wanted))
    return 1 << (size.bit_length() - 1)


@dataclass(frozen=True)
class StoreView:
    """What a store held at one moment; later changes of the store do not reach it.

    Attributes:
        quantizer: decodes the segments.
        segments: the chunks in order of their tokens.
        length: tokens in the view.
    """

    quantizer: Quantizer
    segments: tuple[Segment, ...]
    length: int

    @property
    def device(self) -> torch.device | None:
        """Where the chunks are, or None where there are none."""
        return next((part.device for segment in self.segments for part in segment.parts.values()), None)

    def decode_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Write the states of the tokens from `start`, a multiple of the block length, into `out` `[B, H, T, D]`."""
        block_length = self.quantizer.block_length
        first, wanted, done = start // block_length, out.shape[2] // block_length, 0
        for segment in self.segments:
            if first < segment.used and done < wanted:
                stop = min(segment.used, first + wanted - done)
                parts = {name: part.to(out.device) for name, part in segment.read(first, stop).items()}
                done += stop - first
                target = out[:, :, (done - (stop - first)) * block_length : done * block_length]
                self.quantizer.decode_into(parts, target)
            first = max(0, first - segment.used)


class ChunkedStore:
    """Quantized tokens of one side of one layer.

    Args:
        quantizer: encodes and decodes; its layout decides what is allocated.
        batch_size: rows (B).
        num_heads: key-value heads (H).
        device: where the chunks live; parts are moved there, and back to the states' device to be decoded.
        pinned: whether they are in memory that a GPU copies from on its own.
    """

    def __init__(
        self, quantizer: Quantizer, batch_size: int, num_heads: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        self.quantizer = quantizer
        self.batch_size = batch_size
        self.num_heads = num_heads
        self.device = device
        self.pinned = pinned
        self.block_length = quantizer.block_length
        self.layout = dict(quantizer.layout())
        self.segments = ()
        self._owns_last = True
        self._staged: dict[Segment, Segment] = {}

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The chunks in order of their tokens."""
        return self._segments

    @segments.setter
    def segments(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        # Counted here, since every update asks for the length, and few of them change it.
        self.blocks = sum(segment.used for segment in segments)
        """Stored blocks."""
        self.length = self.blocks * self.block_length
        """Stored tokens."""

    def view(self) -> StoreView:
        """Return what is stored now, without copying."""
        if not self._staged:  # the very same tuple, by which a kernel knows that nothing has changed
            return StoreView(self.quantizer, self.segments, self.length)
        staged = tuple(self._staged.get(segment, segment) for segment in self.segments)
        return StoreView(self.quantizer, staged, self.length)

    def append(self, states: torch.Tensor, following: int = 0) -> None:
        """Quantize and store whole blocks.

        Args:
            states: `[B, H, T, D]`, T a multiple of the block length; read chunk by chunk, never copied as a whole.
            following: tokens that are appended right after, for which a new chunk may leave room.
        """
        coming = following // self.block_length
        wanted = states.shape[2] // self.block_length
        done = 0
        while done < wanted:
            segment = self._open_segment(wanted - done + coming)
            count = min(segment.capacity - segment.used, wanted - done)
            piece = states[:, :, done * self.block_length : (done + count) * self.block_length]
            for rows, first, block_states in self._calls(piece):
                self._write(segment, rows, segment.used + first, block_states)
            self._replace_last(replace(segment, used=segment.used + count))
            done += count

    def append_encoded(self, parts: Mapping[str, torch.Tensor], rows: torch.Tensor | None = None) -> None:
        """Store blocks that were encoded before, in chunks like those of one `append`.

        Args:
            parts: `[B0, H, blocks, *part.shape]` for each part of the layout; copied.
            rows: int64 `[B]`, which of the `B0` rows each row of the batch reads, or None where they are the batch.
        """
        held, _, total = next(iter(parts.values())).shape[:3]
        done = 0
        while done < total:
            segment = self._allocate(chunk_capacity(0, total - done, self.block_length), held)
            for name, part in segment.parts.items():
                part.copy_(parts[name][:, :, done : done + segment.capacity])
            order = None if rows is None else rows.to(self.device)
            self.segments = (*self.segments, replace(segment, used=segment.capacity, rows=order))
            done += segment.capacity
        self._owns_last = True

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, a multiple of the block length."""
        keep = length // self.block_length
        kept: list[Segment] = []
        for segment in self.segments:
            if keep <= 0:
                break
            kept.append(segment if segment.used <= keep else replace(segment, used=keep))
            keep -= kept[-1].used
        # Views of what is cut off may still be read: the chunk is copied before it is written to again.
        self._owns_last = self._owns_last and tuple(kept) == self.segments
        self.segments = tuple(kept)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row `i` of the batch what was row `rows[i]`, int64 `[B']`.

        The packed bytes stay where they are and an index is kept, unless fewer rows remain, which frees the others.
        """
        rows = rows.to(self.device, copy=True)
        shrinks = len(rows) < self.batch_size
        self.batch_size = len(rows)
        chosen = [replace(s, rows=rows if s.rows is None else s.rows[rows]) for s in self.segments]
        self.segments = tuple(self._copied(segment) for segment in chosen) if shrinks else tuple(chosen)
        self._owns_last = shrinks

    def fork(self, quantizer: Quantizer) -> ChunkedStore:
        """Return an independent store that shares the present chunks; neither side writes to them again.

        Args:
            quantizer: of the new store; decodes what is shared.
        """
        self._owns_last = False
        other = ChunkedStore(quantizer, self.batch_size, self.num_heads, self.device, pinned=self.pinned)
        other.segments, other._owns_last = self.segments, False
        return other

    def moved_to(self, device: torch.device, quantizer: Quantizer, *, pinned: bool) -> ChunkedStore:
        """Return an independent store on another device; on the same one it shares the present chunks."""
        if device == self.device:
            return self.fork(quantizer)
        other = ChunkedStore(quantizer, self.batch_size, self.num_heads, device, pinned=pinned)
        other.segments = copy_segments(self.segments, device, pinned=pinned)
        return other

    def stage(self, device: torch.device) -> None:
        """Keep copies of the chunks on a device, for views to read; what is written goes to the chunks."""
        waiting = tuple(segment for segment in self.segments if segment not in self._staged)
        kept = {segment: self._staged[segment] for segment in self.segments if segment in self._staged}
        self._staged = kept | dict(zip(waiting, copy_segments(waiting, device, pinned=False), strict=True))

    def release_staged(self) -> None:
        """Forget the staged copies; views that were taken keep theirs."""
        self._staged = {}

    def checkpoint(self) -> tuple[tuple[Segment, ...], bool]:
        """Return what `restore` needs to undo appends made from now on."""
        return self.segments, self._owns_last

    def restore(self, checkpoint: tuple[tuple[Segment, ...], bool]) -> None:
        """Forget all that was appended since the checkpoint."""
        self.segments, self._owns_last = checkpoint

    def tensors(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield each tensor of the chunks with the share of it that is in use."""
        for segment in (*self.segments, *self._staged.values()):
            for part in segment.parts.values():
                yield part, segment.used / segment.capacity

    def row_indices(self) -> list[torch.Tensor]:
        """Return the distinct batch indices that segments carry."""
        return list({id(s.rows): s.rows for s in self.segments if s.rows is not None}.values())

    def _calls(self, states: torch.Tensor) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Yield what is quantized together: rows of the batch, index of the first block, and their states."""
        per_block = states[:, :, : self.block_length].numel()
        blocks = max(1, ENCODE_ELEMENTS // per_block) if self.quantizer.group_local else 1
        rows = states.shape[0] if self.quantizer.group_local else 1
        for row in range(0, states.shape[0], rows):
            chosen = slice(row, row + rows)
            for index, piece in enumerate(states[chosen].split(blocks * self.block_length, dim=2)):
                yield chosen, index * blocks, piece

    def _write(self, segment: Segment, rows: slice, first: int, states: torch.Tensor) -> None:
        encoded = self.quantizer.encode(states)
        count = states.shape[2] // self.block_length
        self._check_encoded(encoded, states.shape[0], count)
        if isinstance(self.quantizer, GuardedQuantizer):
            self.quantizer.look_at_first(states, encoded)
        for name, part in segment.parts.items():
            part[rows, :, first : first + count].copy_(encoded[name])

    def _open_segment(self, wanted: int) -> Segment:
        """Return the last segment with room to write, opening or copying a chunk where need be."""
        if self.segments and self.segments[-1].used < self.segments[-1].capacity:
            if not self._owns_last:
                self._replace_last(self._copied(self.segments[-1]))
        else:
            capacity = chunk_capacity(self.blocks, wanted, self.block_length)
            self.segments = (*self.segments, self._allocate(capacity))
        self._owns_last = True
        return self.segments[-1]

    def _replace_last(self, segment: Segment) -> None:
        self.segments = (*self.segments[:-1], segment)

    def _copied(self, segment: Segment) -> Segment:
        copy = self._allocate(segment.capacity)
        for name, part in segment.read(0, segment.used).items():
            copy.parts[name][:, :, : segment.used].copy_(part)
        return replace(copy, used=segment.used)

    def _allocate(self, capacity: int, rows: int | None = None) -> Segment:
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            parts = {
                name: torch.empty(
                    (rows or self.batch_size, self.num_heads, capacity, *part.shape),
                    dtype=part.dtype,
                    device=self.device,
                    pin_memory=self.pinned,
                )
                for name, part in self.layout.items()
            }
        return Segment(parts, used=0, capacity=capacity)

    def _check_encoded(self, encoded: object, rows: int, blocks: int) -> None:
        name = name_quantizer(self.quantizer)
        if not isinstance(encoded, Mapping) or encoded.keys() != self.layout.keys():
            found = sorted(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
            raise QuantizerContractError(f"{name}.encode returned {found}; its layout has {sorted(self.layout)}")
        for part_name, part in self.layout.items():
            shape = (rows, self.num_heads, blocks, *part.shape)
            tensor = encoded[part_name]
            if tuple(tensor.shape) != shape or tensor.dtype != part.dtype:
                raise QuantizerContractError(
                    f"{name}.encode returned {part_name!r} as {tensor.dtype} {list(tensor.shape)}; "
                    f"its layout says {part.dtype} {list(shape)}"
                )
