"""All that one side of one layer holds, as one value, and the values that adding and forgetting tokens make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from kvq.store.chunks import ChunkedStore
from kvq.store.cropped_groups import CroppedGroups
from kvq.store.held import ExactPiece, Held
from kvq.store.sinks import SinkTokens
from kvq.store.window import TokenBuffer

_NO_PIECES = ("store", "dropped")


@dataclass(frozen=True, eq=False)
class SideContents:
    """All that a side holds at one moment: a value, so a checkpoint of a side is a reference to it.

    Every field that is given, but the store and `dropped`, is an `ExactPiece`. One that is added here is counted,
    saved, moved, reordered, forked and undone with the others.

    Attributes:
        store: the quantized tokens.
        window: the newest tokens, exact.
        sinks: the first tokens, exact.
        cropped: the groups that crops cut.
        dropped: tokens that came before the first one held and are forgotten; positions count from the first one held.
        length: tokens held. One number, since torch.compile compiles a model again for each whose changes it sees.
        seen: tokens held and dropped; one number for the same reason.
    """

    store: ChunkedStore
    window: TokenBuffer
    sinks: SinkTokens
    cropped: CroppedGroups = field(default_factory=CroppedGroups)
    dropped: int = 0
    length: int = field(init=False)
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.store.length + self.window.length)
        object.__setattr__(self, "seen", self.dropped + self.length)

    def held(self) -> Iterator[Held]:
        """Yield every tensor that is held."""
        yield from self.store.held()
        yield from self._held_exactly()

    def holds_tensors_of(self, other: SideContents) -> bool:
        """Return whether the very tensors of other contents are held; tokens may lie in more of their room."""
        own, others = ([id(one.tensor) for one in contents._held_exactly()] for contents in (self, other))
        return self.store is other.store and own == others

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the exact pieces that a file needs, by their names there."""
        for piece in self._exact_pieces().values():
            yield from piece.saved()

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> SideContents:
        """Return these contents, whose exact pieces are empty, with the tensors that `saved` of others yielded."""
        return self._with_each(lambda piece: piece.restored(tensors))

    def appended(self, new: torch.Tensor, flush_count: int, flush_length: int) -> SideContents:
        """Return the contents with tokens `[B, H, T, D]` added, copied, and the oldest `flush_count` quantized.

        Args:
            new: the tokens.
            flush_count: how many of these tokens and those in the window to quantize, a multiple of `flush_length`.
            flush_length: tokens that are flushed together.
        """
        if not flush_count:  # nearly every step of decoding
            return SideContents(self.store, self.window.extended(new), self.sinks, self.cropped, self.dropped)
        store, sinks = self.store, self.sinks
        kept = self.window.length + new.shape[2] - flush_count
        for piece in self._flushed_pieces(new, flush_count, flush_length):
            for part in self._split_behind_sinks(piece, store.length, flush_length):
                sinks, states = sinks.withhold(part, store.length, store.block_length)
                flush_count -= part.shape[2]
                store = store.append(states, following=flush_count)
        return replace(self, store=store, sinks=sinks, window=self.window.keep_last(kept, new))

    def truncated(self, length: int, left: torch.Tensor | None) -> SideContents:
        """Return the contents without the tokens from position `length` on.

        Args:
            length: tokens that stay.
            left: the tokens `[B, H, T, D]` before that position which leave the store, since their group is cut there;
                None where no group is cut.
        """
        cropped, stored = self.cropped.before(length), self.store.length
        if length >= stored:
            return replace(self, window=self.window.truncate(length - stored), cropped=cropped)
        exact = self.window.view()[:, :, :0]
        if left is not None:
            length -= left.shape[2]
            cropped = cropped.cut(length, left)
            exact = cropped.groups[-1].states
        window = TokenBuffer.of(self.window.step, exact)
        return replace(self, store=self.store.truncate(length), window=window, cropped=cropped)

    def without_first(self, count: int) -> SideContents:
        """Return the contents without their first `count` tokens, whole chunks of the store."""
        return replace(
            self,
            store=self.store.without_first(count),
            sinks=self.sinks.without_first(count),
            cropped=self.cropped.without_first(count),
            dropped=self.dropped + count,
        )

    def leapt(self, count: int) -> SideContents:
        """Return the contents without any token, to go on `count` tokens behind the first one held."""
        return replace(
            self,
            store=self.store.truncate(0),
            window=TokenBuffer.of(self.window.step, self.window.view()[:, :, :0]),
            sinks=self.sinks.without_first(count),
            cropped=CroppedGroups(),
            dropped=self.dropped + count,
        )

    def select_rows(self, rows: torch.Tensor) -> SideContents:
        """Return the contents of a batch whose row `i` was row `rows[i]`, int64 `[B']`."""
        return replace(self._with_each(lambda piece: piece.select_rows(rows)), store=self.store.select_rows(rows))

    def moved_to(self, device: torch.device, store: ChunkedStore) -> SideContents:
        """Return the contents with the exact pieces on a device, beside a store that was moved."""
        return replace(self._with_each(lambda piece: piece.moved_to(device)), store=store)

    def shared(self) -> SideContents:
        """Return the same contents, which never write to their tensors, so another side may hold them."""
        return replace(self._with_each(lambda piece: piece.shared()), store=self.store.shared())

    def _held_exactly(self) -> Iterator[Held]:
        for piece in self._exact_pieces().values():
            yield from piece.held()

    def _exact_pieces(self) -> dict[str, ExactPiece]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name not in _NO_PIECES}

    def _with_each(self, change: Callable[[ExactPiece], ExactPiece]) -> SideContents:
        # A tensor made under inference_mode could not be used by autograd outside of it.
        with torch.inference_mode(False):
            changed: dict[str, Any] = {name: change(piece) for name, piece in self._exact_pieces().items()}
        return replace(self, **changed)

    def _split_behind_sinks(self, piece: torch.Tensor, stored: int, flush_length: int) -> Sequence[torch.Tensor]:
        """Return a piece in two where sinks and padding end, since only the part that has them is copied."""
        end = -(-max(self.sinks.ends) // flush_length) * flush_length - stored
        return piece.tensor_split([end], dim=2) if 0 < end < piece.shape[2] else [piece]

    def _flushed_pieces(self, new: torch.Tensor, count: int, flush_length: int) -> Iterator[torch.Tensor]:
        """Yield the oldest `count` tokens in whole flush lengths; only one that straddles window and new is copied."""
        window = self.window.view()
        from_window = min(self.window.length, count)
        aligned = from_window // flush_length * flush_length
        if aligned:
            yield window[:, :, :aligned]
        start = 0
        if aligned < from_window:
            start = flush_length - (from_window - aligned)
            yield torch.cat([window[:, :, aligned:from_window], new[:, :, :start]], dim=2)
        if count > from_window + start:
            yield new[:, :, start : count - from_window]
