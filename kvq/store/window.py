"""Tokens in full precision, in a buffer that grows by whole steps."""

from __future__ import annotations

import torch

MAX_STEP = 512
"""Most tokens by which the capacity grows: the room in a window of long blocks must not outweigh what it holds."""


class TokenBuffer:
    """The newest tokens of one side of one layer.

    A view taken from it stays valid: appending writes behind the view, and everything else moves to a new buffer.

    Args:
        step: tokens by which the capacity grows, `MAX_STEP` at most.
        states: the first tokens, `[B, H, T, D]`, copied; T may be 0.
    """

    def __init__(self, step: int, states: torch.Tensor) -> None:
        self.step = min(step, MAX_STEP)
        self.length: int
        self._buffer: torch.Tensor
        self.set(states)

    @property
    def buffer(self) -> torch.Tensor:
        """What is allocated, `[B, H, capacity, D]`."""
        return self._buffer

    def view(self) -> torch.Tensor:
        """Return the tokens held, a view `[B, H, length, D]`."""
        return self._buffer[:, :, : self.length]

    def append(self, states: torch.Tensor) -> None:
        """Add tokens `[B, H, T, D]` at the end; they are copied."""
        self.keep_last(self.length + states.shape[2], states)

    def keep_last(self, count: int, new: torch.Tensor) -> None:
        """Hold the last `count` tokens of what is held followed by `new` `[B, H, T, D]`."""
        kept = max(0, count - new.shape[2])
        added = new[:, :, new.shape[2] - (count - kept) :]
        if kept < self.length or count > self._buffer.shape[2]:
            held = self.view()[:, :, self.length - kept :]
            self._buffer = self._allocate(count, new)
            self._buffer[:, :, :kept].copy_(held)
        self._buffer[:, :, kept:count].copy_(added)
        self.length = count

    def set(self, states: torch.Tensor) -> None:
        """Hold exactly `states` `[B, H, T, D]`, copied."""
        self.length = states.shape[2]
        self._buffer = self._allocate(self.length, states)
        self._buffer[:, :, : self.length].copy_(states)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if length < self.length:
            self.set(self.view()[:, :, :length])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row `i` of the batch what was row `rows[i]`."""
        self.set(self.view().index_select(0, rows.to(self._buffer.device)))

    def copy(self) -> TokenBuffer:
        """Return an independent buffer with the same tokens."""
        return TokenBuffer(self.step, self.view())

    def checkpoint(self) -> tuple[torch.Tensor, int]:
        """Return what `restore` needs to undo changes made from now on."""
        return self._buffer, self.length

    def restore(self, checkpoint: tuple[torch.Tensor, int]) -> None:
        """Hold what was held at the checkpoint."""
        self._buffer, self.length = checkpoint

    def _allocate(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return room for `count` tokens of the kind of `like`, in whole steps."""
        capacity = -(-count // self.step) * self.step
        shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
