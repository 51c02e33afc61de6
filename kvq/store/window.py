"""Tokens in full precision, in a buffer that grows by whole steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kvq.store.held import Held

MAX_STEP = 512
"""Most tokens by which the capacity grows: the room in a window of long blocks must not outweigh what it holds."""


@dataclass(frozen=True, eq=False)
class TokenBuffer:
    """The newest tokens of one side of one layer; an `ExactPiece`.

    A view taken from it stays valid: tokens are added behind the view where the buffer has room, and everything else
    makes a new buffer. Only the newest of the values that share a buffer may be added to; see `shared`.

    Attributes:
        step: tokens by which the capacity grows, `MAX_STEP` at most.
        buffer: the allocated tensor, `[B, H, capacity, D]`.
        length: tokens held.
        is_refilled: whether somebody may write other tokens over those held, at the same place; what is shared is then
            a copy.
    """

    step: int
    buffer: torch.Tensor
    length: int
    is_refilled: bool = False

    @classmethod
    def of(cls, step: int, states: torch.Tensor) -> TokenBuffer:
        """Return a buffer that holds `states` `[B, H, T, D]`, copied; T may be 0."""
        length, step = states.shape[2], min(step, MAX_STEP)
        buffer = _allocate(length, step, states)
        buffer[:, :, :length].copy_(states)
        return cls(step, buffer, length)

    def view(self) -> torch.Tensor:
        """Return the tokens held, a view `[B, H, length, D]`."""
        return self.buffer[:, :, : self.length]

    def keep_last(self, count: int, new: torch.Tensor) -> TokenBuffer:
        """Return a buffer with the last `count` tokens of those held followed by `new` `[B, H, T, D]`, copied."""
        kept = max(0, count - new.shape[2])
        added = new[:, :, new.shape[2] - (count - kept) :]
        buffer = self.buffer
        if kept < self.length or count > buffer.shape[2]:
            held = self.view()[:, :, self.length - kept :]
            buffer = _allocate(count, self.step, new)
            buffer[:, :, :kept].copy_(held)
        buffer[:, :, kept:count].copy_(added)
        return TokenBuffer(self.step, buffer, count, self.is_refilled and buffer is self.buffer)

    def extended(self, new: torch.Tensor) -> TokenBuffer:
        """Return a buffer with `new` `[B, H, T, D]` behind the tokens held, copied."""
        added = new.shape[2]
        count = self.length + added
        if count > self.buffer.shape[2]:
            return self.keep_last(count, new)
        self.buffer.narrow(2, self.length, added).copy_(new)
        return TokenBuffer(self.step, self.buffer, count, self.is_refilled)

    def truncate(self, length: int) -> TokenBuffer:
        """Return a buffer without the tokens from `length` on."""
        return TokenBuffer.of(self.step, self.view()[:, :, :length]) if length < self.length else self

    def held(self) -> Iterator[Held]:
        """Yield the buffer."""
        used = self.view().nbytes / max(1, self.buffer.untyped_storage().nbytes())
        yield Held("window", self.buffer, used)

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tokens held."""
        yield "window", self.view()

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> TokenBuffer:
        """Return a buffer with saved tokens, copied."""
        return TokenBuffer.of(self.step, tensors["window"])

    def select_rows(self, rows: torch.Tensor) -> TokenBuffer:
        """Return the buffer of a batch whose row `i` was row `rows[i]`."""
        return self._without_room(self.view().index_select(0, rows.to(self.buffer.device)))

    def moved_to(self, device: torch.device) -> TokenBuffer:
        """Return the buffer on a device."""
        return self._without_room(self.view().to(device))

    def shared(self) -> TokenBuffer:
        """Return a buffer without room, so adding to it copies it first."""
        return self._without_room(self.view().clone() if self.is_refilled else self.view())

    def _without_room(self, states: torch.Tensor) -> TokenBuffer:
        return TokenBuffer(self.step, states, self.length)


def _allocate(count: int, step: int, like: torch.Tensor) -> torch.Tensor:
    """Return room for `count` tokens of the kind of `like`, in whole steps."""
    capacity = -(-count // step) * step
    shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
    # A tensor made under inference_mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
