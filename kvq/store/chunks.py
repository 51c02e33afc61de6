"""Packed tokens of one side of one layer, in chunks that are never moved once they are full.

Owns growth, sharing between forks, batch order and truncation, for any `Quantizer`. It must not know what the parts
mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from kvq.plugin_api.quantizer import Quantizer
from kvq.store.chunk_writer import ChunkWriter
from kvq.store.held import Held
from kvq.store.segments import Segment, copy_segments

MAX_CHUNK_LENGTH = 2048
"""Tokens in the largest chunk."""
GROWTH_DIVISOR = 4
"""A chunk opened for future tokens holds at most this fraction of the stored blocks, which bounds the slack."""


def chunk_capacity(stored: int, wanted: int, block_length: int, lengths: tuple[int, int] | None = None) -> int:
    """Return the capacity, in blocks, of the next chunk: a power of two, or as many times the smallest chunk.

    Args:
        stored: blocks already stored.
        wanted: blocks about to be appended; a chunk that they fill at once has no slack.
        block_length: tokens of a block.
        lengths: tokens of the smallest and of the largest chunk, the former whole blocks; None: a block and 2,048.
    """
    smallest, longest = lengths or (block_length, MAX_CHUNK_LENGTH)
    unit = smallest // block_length
    largest = max(1, longest // smallest)
    size = min(largest, max(1, stored // (GROWTH_DIVISOR * unit), wanted // unit))
    return unit << (size.bit_length() - 1)


@dataclass(frozen=True)
class StoreView:
    """The tokens of a store at one moment; later changes of the store do not reach it.

    Attributes:
        codec: the quantizer that decodes the segments.
        segments: the chunks in order of their tokens.
        length: tokens in the view.
        device: where the chunks are, or None where there are none.
        is_reordered: whether the rows of the batch are in another order than in some chunk.
    """

    codec: Quantizer
    segments: tuple[Segment, ...]
    length: int
    device: torch.device | None = field(init=False)
    is_reordered: bool = field(init=False)

    def __post_init__(self) -> None:
        # Found once: asked in every layer at every step.
        parts = (part for segment in self.segments for part in segment.parts.values())
        object.__setattr__(self, "device", next((part.device for part in parts), None))
        object.__setattr__(self, "is_reordered", any(segment.rows is not None for segment in self.segments))

    def decode_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Write the states of the tokens from `start`, a multiple of the block length, into `out` `[B, H, T, D]`."""
        block_length = self.codec.block_length
        first, wanted, done = start // block_length, out.shape[2] // block_length, 0
        for segment in self.segments:
            if first < segment.used and done < wanted:
                stop = min(segment.used, first + wanted - done)
                parts = {name: part.to(out.device) for name, part in segment.read(first, stop).items()}
                done += stop - first
                target = out[:, :, (done - (stop - first)) * block_length : done * block_length]
                self.codec.decode_into(parts, target)
            first = max(0, first - segment.used)


@dataclass(frozen=True, eq=False)
class ChunkedStore:
    """The quantized tokens of one side of one layer: an immutable value, except that the last chunk grows in place.

    Every change returns another store. Blocks are written behind the used ones of a chunk, which only the newest of the
    stores that share it may do; see `shared`.

    Attributes:
        writer: makes the chunks and encodes into them.
        batch_size: rows (B).
        segments: the chunks in order of their tokens.
        owns_last: whether blocks may be written into the room of the last chunk; else it is copied first.
        prefetched: copies of chunks on another device, which views read instead.
        blocks: stored blocks.
        length: stored tokens.
        seen: the tokens stored now, which kernels know again by this very object.
    """

    writer: ChunkWriter
    batch_size: int
    segments: tuple[Segment, ...] = ()
    owns_last: bool = True
    prefetched: Mapping[Segment, Segment] = field(default_factory=dict)
    blocks: int = field(init=False)
    length: int = field(init=False)
    seen: StoreView = field(init=False)

    def __post_init__(self) -> None:
        # Found once: every update asks for them, and few of them change anything.
        object.__setattr__(self, "blocks", sum(segment.used for segment in self.segments))
        object.__setattr__(self, "length", self.blocks * self.block_length)
        read = tuple(self.prefetched.get(segment, segment) for segment in self.segments)
        object.__setattr__(self, "seen", StoreView(self.codec, read if self.prefetched else self.segments, self.length))

    @property
    def codec(self) -> Quantizer:
        """The quantizer that encodes and decodes."""
        return self.writer.codec

    @property
    def block_length(self) -> int:
        """Tokens of a block."""
        return self.writer.block_length

    @property
    def num_heads(self) -> int:
        """Key-value heads (H)."""
        return self.writer.num_heads

    @property
    def device(self) -> torch.device:
        """Where the chunks live; parts are moved there, and back to the states' device to be decoded."""
        return self.writer.device

    def view(self) -> StoreView:
        """Return the tokens stored now, without copying."""
        return self.seen

    def append(self, states: torch.Tensor, following: int = 0) -> ChunkedStore:
        """Quantize and store whole blocks.

        Args:
            states: `[B, H, T, D]`, T a multiple of the block length; read chunk by chunk, never copied as a whole.
            following: tokens that are appended right after, for which a new chunk may leave room.
        """
        store, start = self, 0
        while start < states.shape[2]:
            store = store._with_room((states.shape[2] - start + following) // self.block_length)
            last = store.segments[-1]
            stop = min(states.shape[2], start + (last.capacity - last.used) * self.block_length)
            store = store._ending_in(self.writer.write(last, states[:, :, start:stop]))
            start = stop
        return store

    def append_encoded(self, parts: Mapping[str, torch.Tensor], rows: torch.Tensor | None = None) -> ChunkedStore:
        """Store blocks that were encoded before, in chunks like those of one `append`.

        Args:
            parts: `[B0, H, blocks, *part.shape]` for each part of the layout; copied.
            rows: int64 `[B]`, which of the `B0` rows each row of the batch reads, or None where they are the batch.
        """
        held, _, total = next(iter(parts.values())).shape[:3]
        order = None if rows is None else rows.to(self.device)
        added: list[Segment] = []
        done = 0
        while done < total:
            segment = self.writer.allocate(self._next_capacity(0, total - done), held)
            count = min(segment.capacity, total - done)
            for name, part in segment.parts.items():
                part[:, :, :count].copy_(parts[name][:, :, done : done + count])
            added.append(replace(segment, used=count, rows=order))
            done += count
        return replace(self, segments=(*self.segments, *added), owns_last=True)

    def truncate(self, length: int) -> ChunkedStore:
        """Forget the tokens from `length` on, a multiple of the block length."""
        keep = length // self.block_length
        kept: list[Segment] = []
        for segment in self.segments:
            if keep <= 0:
                break
            kept.append(segment if segment.used <= keep else replace(segment, used=keep))
            keep -= kept[-1].used
        # Views may still read what is cut off: the chunk is copied before it is written to again.
        return replace(self, segments=tuple(kept), owns_last=self.owns_last and tuple(kept) == self.segments)

    def count_leading(self, limit: int) -> int:
        """Return the tokens of the leading chunks that lie whole before position `limit`."""
        count = 0
        for segment in self.segments:
            length = segment.used * self.block_length
            if count + length > limit or segment.used < segment.capacity:
                break
            count += length
        return count

    def without_first(self, length: int) -> ChunkedStore:
        """Return the store without its first `length` tokens, as `count_leading` counts them."""
        left, gone = self.segments, length // self.block_length
        while gone > 0:
            gone -= left[0].used
            left = left[1:]
        prefetched = {segment: self.prefetched[segment] for segment in left if segment in self.prefetched}
        return replace(self, segments=left, prefetched=prefetched)

    def select_rows(self, rows: torch.Tensor) -> ChunkedStore:
        """Reorder the rows: row `i` becomes the former row `rows[i]`, int64 `[B']`.

        The packed bytes stay where they are and an index is kept, unless fewer rows remain, which frees the others.
        """
        rows = rows.to(self.device, copy=True)
        shrinks = len(rows) < self.batch_size
        chosen = [replace(s, rows=rows if s.rows is None else s.rows[rows]) for s in self.segments]
        if shrinks:
            chosen = [self.writer.copy(segment, len(rows)) for segment in chosen]
        return replace(self, batch_size=len(rows), segments=tuple(chosen), owns_last=shrinks)

    def shared(self) -> ChunkedStore:
        """Return a store with the same chunks that never writes to them, so another side may hold it."""
        return replace(self, owns_last=False)

    def with_codec(self, codec: Quantizer) -> ChunkedStore:
        """Return a store whose blocks another, equal quantizer decodes and adds to."""
        return replace(self, writer=self._new_writer(codec, self.device, pinned=self.writer.pinned))

    def moved_to(self, device: torch.device, codec: Quantizer, *, pinned: bool) -> ChunkedStore:
        """Return the store on another device; on the same one it shares the present chunks."""
        if device == self.device:
            return self.shared().release_prefetched().with_codec(codec)
        segments = copy_segments(self.segments, device, pinned=pinned)
        return ChunkedStore(self._new_writer(codec, device, pinned=pinned), self.batch_size, segments)

    def prefetch(self, device: torch.device) -> ChunkedStore:
        """Keep copies of the chunks on a device, for views to read; writes go to the chunks."""
        waiting = tuple(segment for segment in self.segments if segment not in self.prefetched)
        kept = {segment: self.prefetched[segment] for segment in self.segments if segment in self.prefetched}
        added = dict(zip(waiting, copy_segments(waiting, device, pinned=False), strict=True))
        return replace(self, prefetched=kept | added)

    def release_prefetched(self) -> ChunkedStore:
        """Forget the prefetched copies; views that were taken keep theirs."""
        return replace(self, prefetched={}) if self.prefetched else self

    def tensors(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield each tensor of the chunks with the share of it that is in use."""
        for segment in (*self.segments, *self.prefetched.values()):
            for part in segment.parts.values():
                yield part, segment.used / segment.capacity

    def held(self) -> Iterator[Held]:
        """Yield every tensor that the store holds: packed parts, batch orders and the constants of its quantizer."""
        yield from (Held("packed", part, used) for part, used in self.tensors())
        orders = {id(segment.rows): segment.rows for segment in self.segments if segment.rows is not None}
        yield from (Held("order", rows) for rows in orders.values())
        yield from (Held("constants", tensor) for tensor in self.codec.constants().values())

    def _with_room(self, wanted: int) -> ChunkedStore:
        """Return a store whose last chunk has room to write, opening or copying one where need be."""
        if self.segments and self.segments[-1].used < self.segments[-1].capacity:
            return self if self.owns_last else self._ending_in(self.writer.copy(self.segments[-1], self.batch_size))
        segment = self.writer.allocate(self._next_capacity(self.blocks, wanted), self.batch_size)
        return replace(self, segments=(*self.segments, segment), owns_last=True)

    def _next_capacity(self, stored: int, wanted: int) -> int:
        return chunk_capacity(stored, wanted, self.block_length, self.writer.chunk_lengths)

    def _new_writer(self, codec: Quantizer, device: torch.device, *, pinned: bool) -> ChunkWriter:
        return ChunkWriter(codec, self.num_heads, device, pinned=pinned, chunk_lengths=self.writer.chunk_lengths)

    def _ending_in(self, segment: Segment) -> ChunkedStore:
        return replace(self, segments=(*self.segments[:-1], segment), owns_last=True)
