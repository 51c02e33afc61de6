"""One side of one layer: sinks, store and window together, and the view that attention reads.

Owns the rule of what is quantized when: flushes happen at fixed token positions, so that what is stored depends on the
states and not on how the updates that brought them were split.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq.plugin_api.quantizer import Quantizer
from kvq.store.chunks import ChunkedStore, StoreView
from kvq.store.constants import restore_constants
from kvq.store.cropped_groups import SurvivorLog
from kvq.store.own_dtypes import without_autocast
from kvq.store.sinks import SinkTokens
from kvq.store.window import TokenBuffer


@dataclass(frozen=True)
class SideView:
    """The tokens of one side at one moment: what was held, then the states of the current forward, exact.

    Attributes:
        sinks: laid over the stored tokens.
        store: the quantized tokens.
        window: the newest tokens, `[B, H, W, D]`.
        new: the states that the current update brought, `[B, H, T, D]`, or None.
    """

    sinks: SinkTokens
    store: StoreView
    window: torch.Tensor
    new: torch.Tensor | None

    @property
    def length(self) -> int:
        """Tokens in the view."""
        return self.store.length + self.window.shape[2] + (0 if self.new is None else self.new.shape[2])

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the batch, heads, head dim, dtype and device of the states."""
        return self.window

    def materialize(self) -> torch.Tensor:
        """Return `[B, H, length, D]` in the dtype of the states; never aliases what the cache holds.

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
        quantizer: of the stored tokens.
        like: states `[B, H, T, D]` that give batch, heads, dtype and device.
        device: where the store lives.
        flush_length: tokens that are flushed together, a multiple of the block length.
        sinks: which tokens are never quantized.
    """

    def __init__(
        self, quantizer: Quantizer, like: torch.Tensor, device: torch.device, flush_length: int, sinks: SinkTokens
    ) -> None:
        self.quantizer = quantizer
        self.flush_length = flush_length
        self.sinks = sinks
        self.store = ChunkedStore(quantizer, like.shape[0], like.shape[1], device, pinned=_pins(device, like.device))
        self.window = TokenBuffer(flush_length, like[:, :, :0].detach())
        self.survivors = SurvivorLog()

    @property
    def dtype(self) -> torch.dtype:
        """Of the states; keys and values each have their own."""
        return self.window.buffer.dtype

    def view(self, new: torch.Tensor | None = None) -> SideView:
        """Return what is held now, followed by `new`."""
        return SideView(self.sinks, self.store.view(), self.window.view(), new)

    def append(self, new: torch.Tensor, flush_count: int) -> None:
        """Add tokens at the end and quantize the oldest `flush_count` of window and new ones.

        Args:
            new: `[B, H, T, D]`, copied; the caller keeps its tensor.
            flush_count: a multiple of the flush length.
        """
        with without_autocast(new.device):
            self._append(new.detach(), flush_count)

    def _append(self, new: torch.Tensor, flush_count: int) -> None:
        kept = self.window.length + new.shape[2] - flush_count
        for piece in self._flushed_pieces(new, flush_count):
            for part in self._split_behind_sinks(piece):
                states = self.sinks.withhold(part, self.store.length, self.quantizer.block_length)
                flush_count -= part.shape[2]
                self.store.append(states, following=flush_count)
        self.window.keep_last(kept, new)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on; survivors of a cut group return to the window as states."""
        stored = self.store.length
        self.survivors = self.survivors.before(length)
        if length >= stored:
            self.window.truncate(length - stored)
            return
        kept = length // self.flush_length * self.flush_length
        if kept < length:
            decoded = self.view().decode_stored(kept, kept + self.flush_length)
            self.survivors = self.survivors.cut(kept, decoded[:, :, : length - kept])
        left = self.survivors.groups[-1].states if kept < length else self.window.view()[:, :, :0]
        self.store.truncate(kept)
        self.window.set(left)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row `i` of the batch what was row `rows[i]`."""
        self.store.select_rows(rows)
        self.window.select_rows(rows)
        self.sinks = self.sinks.select_rows(rows.tolist())
        self.survivors = self.survivors.select_rows(rows)

    def fork(self) -> LayerSide:
        """Return an independent side that shares the present chunks.

        The quantizer is shared with them; before there are any, its constants may not be settled yet.
        """
        other = LayerSide.__new__(LayerSide)
        other.quantizer = self.quantizer if self.store.length else copy.deepcopy(self.quantizer)
        other.flush_length = self.flush_length
        other.store, other.window, other.sinks = self.store.fork(other.quantizer), self.window.copy(), self.sinks.copy()
        other.survivors = self.survivors
        return other

    def restore_constants(self, constants: Mapping[str, torch.Tensor], *, settled: bool) -> None:
        """Give a new quantizer what an equal one had learned; see `kvq.store.constants`."""
        restore_constants(self.quantizer, constants, self.window.view(), settled=settled)

    def moved_to(self, device: torch.device, quantizer: Quantizer, store_device: torch.device) -> LayerSide:
        """Return an independent side on other devices.

        Args:
            device: of the exact states.
            quantizer: built for states on that device.
            store_device: of the quantized ones.
        """
        other = LayerSide.__new__(LayerSide)
        other.quantizer, other.flush_length = quantizer, self.flush_length
        other.window = TokenBuffer(self.window.step, self.window.view().to(device))
        other.sinks = self.sinks.moved_to(device)
        other.survivors = self.survivors.moved_to(device)
        other.store = self.store.moved_to(store_device, quantizer, pinned=_pins(store_device, device))
        other.restore_constants(self.quantizer.constants(), settled=bool(self.store.length))
        return other

    def offload(self) -> None:
        """Keep the store on the CPU from now on, and nothing of it beside the states."""
        self.store.release_staged()
        cpu = torch.device("cpu")
        if self.store.device.type != cpu.type:
            pinned = _pins(cpu, self.window.buffer.device)
            self.store = self.store.moved_to(cpu, self.quantizer, pinned=pinned)

    def prefetch(self) -> None:
        """Copy a store that lives elsewhere to where the states are, for the next read."""
        device = self.window.buffer.device
        if self.store.device != device:
            self.store.stage(device)

    def checkpoint(self) -> tuple[Any, Any, torch.Tensor | None, SurvivorLog]:
        """Return what `restore` needs to undo a truncation, an append, or both."""
        return self.store.checkpoint(), self.window.checkpoint(), self.sinks.states, self.survivors

    def restore(self, checkpoint: tuple[Any, Any, torch.Tensor | None, SurvivorLog]) -> None:
        """Hold what was held at the checkpoint."""
        store, window, self.sinks.states, self.survivors = checkpoint
        self.store.restore(store)
        self.window.restore(window)

    def _split_behind_sinks(self, piece: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return a piece in two where sinks and padding end, since only the part that has them is copied."""
        end = -(-max(self.sinks.ends) // self.flush_length) * self.flush_length - self.store.length
        return piece.tensor_split([end], dim=2) if 0 < end < piece.shape[2] else [piece]

    def _flushed_pieces(self, new: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Yield the oldest `count` tokens in whole flush lengths; only one that straddles window and new is copied."""
        window = self.window.view()
        from_window = min(self.window.length, count)
        aligned = from_window // self.flush_length * self.flush_length
        if aligned:
            yield window[:, :, :aligned]
        start = 0
        if aligned < from_window:
            start = self.flush_length - (from_window - aligned)
            yield torch.cat([window[:, :, aligned:from_window], new[:, :, :start]], dim=2)
        if count > from_window + start:
            yield new[:, :, start : count - from_window]
