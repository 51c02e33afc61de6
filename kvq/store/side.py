"""One side of one layer: sinks, store and window together, and the view that attention reads.

Owns the rule when tokens are quantized: flushes happen at fixed token positions, so the stored
blocks depend on the states and not on how updates split them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvq.plugin_api.quantizer import Quantizer
from kvq.store.chunk_writer import ChunkWriter
from kvq.store.chunks import ChunkedStore, StoreView
from kvq.store.constants import restore_constants
from kvq.store.cropped_groups import CroppedGroups
from kvq.store.held import Held
from kvq.store.own_dtypes import without_autocast
from kvq.store.side_contents import SideContents
from kvq.store.sinks import SinkTokens
from kvq.store.window import TokenBuffer


@dataclass(frozen=True)
class SideView:
    """The tokens of one side at one moment: those held, then the states of the current forward, exact.

    Attributes:
        contents: the tokens held.
        new: the states that the current update brought, `[B, H, T, D]`, or None.
    """

    contents: SideContents
    new: torch.Tensor | None

    @property
    def sinks(self) -> SinkTokens:
        """Exact states that are laid over the stored tokens."""
        return self.contents.sinks

    @property
    def store(self) -> StoreView:
        """The quantized tokens."""
        return self.contents.store.seen

    @cached_property
    def window(self) -> torch.Tensor:
        """The newest tokens, `[B, H, W, D]`."""
        return self.contents.window.view()

    @property
    def length(self) -> int:
        """Tokens in the view."""
        return self.contents.length + (0 if self.new is None else self.new.shape[2])

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the batch, heads, head dim, dtype and device of the states."""
        return self.contents.window.buffer

    def materialize(self) -> torch.Tensor:
        """Return `[B, H, length, D]` in the dtype of the states; never aliases a tensor of the cache.

        Where `new` is all there is, it is `new` itself: the caller's own tensor.
        """
        with without_autocast(self.like.device):
            return self._join()

    def _join(self) -> torch.Tensor:
        exact = [self.window] if self.new is None else [self.window, self.new]
        stored = self.store.length
        if not stored:
            return self.new if self.new is not None and not self.window.shape[2] else torch.cat(exact, dim=2)
        like = self.like
        shape = (like.shape[0], like.shape[1], self.length, like.shape[3])
        history = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.decode_into(history[:, :, :stored], 0)
        return _fill(history, stored, exact)

    def decode_stored(self, start: int, stop: int) -> torch.Tensor:
        """Return the stored tokens from `start` to `stop`, multiples of the block length, as states."""
        like = self.like
        shape = (like.shape[0], like.shape[1], stop - start, like.shape[3])
        out = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.decode_into(out, start)
        return out

    def decode_into(self, out: torch.Tensor, start: int) -> None:
        """Write the stored tokens from `start`, a multiple of the block length, into `out` `[B, H, T, D]`."""
        with without_autocast(self.like.device):
            self.store.decode_into(out, start)
        self.sinks.lay_over(out, start, self.store.length)


def _fill(out: torch.Tensor, start: int, parts: list[torch.Tensor]) -> torch.Tensor:
    if any(part.requires_grad for part in parts):
        return torch.cat([out[:, :, :start], *parts], dim=2)
    for part in parts:
        out[:, :, start : start + part.shape[2]].copy_(part)
        start += part.shape[2]
    return out


def _pins(store: torch.device, states: torch.device) -> bool:
    """Return whether a store is in memory that a GPU copies from on its own, while the processor goes on."""
    return store.type == "cpu" and states.type == "cuda"


class LayerSide:
    """Keys or values of one layer.

    Args:
        flush_length: tokens that are flushed together, a multiple of the block length.
        contents: the contents that it begins with.

    Attributes:
        contents: all that it holds; setting it to what it was before undoes every change since.
    """

    def __init__(self, flush_length: int, contents: SideContents) -> None:
        self.flush_length = flush_length
        self.contents = contents

    @classmethod
    def empty(
        cls,
        codec: Quantizer,
        like: torch.Tensor,
        device: torch.device,
        flush_length: int,
        sinks: SinkTokens,
        chunk_lengths: tuple[int, int] | None = None,
    ) -> LayerSide:
        """Return a side that holds nothing yet.

        Args:
            codec: the quantizer of the stored tokens.
            like: states `[B, H, T, D]` that give batch, heads, head dim, dtype and device.
            device: where the store lives.
            flush_length: tokens that are flushed together.
            sinks: which tokens are never quantized.
            chunk_lengths: tokens of the smallest and of the largest chunk of the store; None: as for any store.
        """
        pinned = _pins(device, like.device)
        writer = ChunkWriter(codec, like.shape[1], device, pinned=pinned, chunk_lengths=chunk_lengths)
        window = TokenBuffer.of(flush_length, like[:, :, :0].detach())
        return cls(flush_length, SideContents(ChunkedStore(writer, like.shape[0]), window, sinks))

    @property
    def codec(self) -> Quantizer:
        """The quantizer of the stored tokens."""
        return self.contents.store.codec

    @property
    def store(self) -> ChunkedStore:
        """The quantized tokens."""
        return self.contents.store

    @property
    def window(self) -> TokenBuffer:
        """The newest tokens, exact."""
        return self.contents.window

    @property
    def sinks(self) -> SinkTokens:
        """The first tokens, exact."""
        return self.contents.sinks

    @property
    def cropped(self) -> CroppedGroups:
        """The groups that crops cut."""
        return self.contents.cropped

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.contents.length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states; keys and values each have their own."""
        return self.window.buffer.dtype

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.window.buffer.device

    def held(self) -> Iterator[Held]:
        """Yield every tensor that the side holds, with its role."""
        return self.contents.held()

    def view(self, new: torch.Tensor | None = None) -> SideView:
        """Return the tokens held now, followed by `new`."""
        return SideView(self.contents, new)

    def append(self, new: torch.Tensor, flush_count: int) -> None:
        """Add tokens at the end and quantize the oldest `flush_count` of window and new ones.

        Args:
            new: `[B, H, T, D]`, copied; the caller keeps its tensor.
            flush_count: a multiple of the flush length.
        """
        new = new.detach() if new.requires_grad else new
        if not flush_count:  # copies at most
            self.contents = self.contents.appended(new, 0, self.flush_length)
            return
        with without_autocast(new.device):
            self.contents = self.contents.appended(new, flush_count, self.flush_length)

    def append_encoded(self, parts: Mapping[str, torch.Tensor], rows: torch.Tensor | None = None) -> None:
        """Store blocks that were encoded before; see `ChunkedStore.append_encoded`."""
        self.contents = replace(self.contents, store=self.store.append_encoded(parts, rows))

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on; those that a crop leaves of a group return to the window."""
        kept = length // self.flush_length * self.flush_length
        left = None
        if kept < length < self.store.length:
            left = self.view().decode_stored(kept, kept + self.flush_length)[:, :, : length - kept]
        self.contents = self.contents.truncated(length, left)

    def forget_first(self, count: int) -> None:
        """Forget the first `count` tokens, whole chunks of the store."""
        self.contents = self.contents.without_first(count)

    def leap(self, count: int) -> None:
        """Forget all tokens held, and go on `count` tokens behind the first of them.

        Blocks of the store begin there; after a multiple of the flush length, where they would have begun anyway.
        """
        self.contents = self.contents.leapt(count)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder the rows: row `i` becomes the former row `rows[i]`."""
        self.contents = self.contents.select_rows(rows)

    def fork(self) -> LayerSide:
        """Return an independent side that shares the present tensors.

        Only this side goes on writing behind them; the other one copies before it adds. Nothing here changes, so
        another thread may add tokens meanwhile. The quantizer is shared too; before there are quantized tokens, its
        constants may not be settled yet.
        """
        held = self.contents.shared()
        store = held.store.release_prefetched()
        if not store.length:
            store = store.with_codec(copy.deepcopy(store.codec))
        return LayerSide(self.flush_length, replace(held, store=store))

    def restore_constants(self, constants: Mapping[str, torch.Tensor], *, settled: bool) -> None:
        """Give a new quantizer what an equal one had learned; see `kvq.store.constants`."""
        restore_constants(self.codec, constants, self.window.view(), settled=settled)

    def moved_to(self, device: torch.device, codec: Quantizer, store_device: torch.device) -> LayerSide:
        """Return an independent side on other devices.

        Args:
            device: where the exact states go.
            codec: the quantizer, built for states on that device.
            store_device: where the store goes.
        """
        held = self.contents.shared()
        store = held.store.moved_to(store_device, codec, pinned=_pins(store_device, device))
        other = LayerSide(self.flush_length, held.moved_to(device, store))
        other.restore_constants(held.store.codec.constants(), settled=bool(held.store.length))
        return other

    def offload(self) -> None:
        """Keep the store on the CPU from now on, and nothing of it beside the states."""
        store, cpu = self.store.release_prefetched(), torch.device("cpu")
        if store.device.type != cpu.type:
            store = store.moved_to(cpu, self.codec, pinned=_pins(cpu, self.device))
        self.contents = replace(self.contents, store=store)

    def prefetch(self) -> None:
        """Copy a store that lives elsewhere to where the states are, for the next read."""
        if self.store.device != self.device:
            self.contents = replace(self.contents, store=self.store.prefetch(self.device))

    def release_prefetched(self) -> None:
        """Forget what `prefetch` copied."""
        self.contents = replace(self.contents, store=self.store.release_prefetched())
