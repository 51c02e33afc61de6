"""Tokens in full precision, in a buffer that grows by whole steps."""

from __future__ import annotations

import torch


class TokenBuffer:
    """The newest tokens of one side of one layer.

    A view taken from it stays valid: appending writes behind the view, and everything else moves to a new buffer.

    Args:
        step: tokens by which the capacity grows.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.length = 0
        self._buffer: torch.Tensor | None = None

    @property
    def buffer(self) -> torch.Tensor | None:
        """What is allocated, `[B, H, capacity, D]`, or None."""
        return self._buffer

    def view(self) -> torch.Tensor | None:
        """Return the tokens held, a view `[B, H, length, D]`, or None before the first."""
        return None if self._buffer is None else self._buffer[:, :, : self.length]

    def append(self, states: torch.Tensor) -> None:
        """Add tokens `[B, H, T, D]` at the end; they are copied."""
        self.keep_last(self.length + states.shape[2], states)

    def keep_last(self, count: int, new: torch.Tensor) -> None:
        """Hold the last `count` tokens of what is held followed by `new` `[B, H, T, D]`."""
        kept = max(0, count - new.shape[2])
        added = new[:, :, new.shape[2] - (count - kept) :]
        if self._buffer is None or kept < self.length or count > self._buffer.shape[2]:
            self._move(kept, count, new)
        assert self._buffer is not None  # noqa: S101  # _move made it
        self._buffer[:, :, kept:count].copy_(added)
        self.length = count

    def set(self, states: torch.Tensor) -> None:
        """Hold exactly `states` `[B, H, T, D]`, copied."""
        self._buffer = None
        self.length = 0
        self.keep_last(states.shape[2], states)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        view = self.view()
        if view is not None and length < self.length:
            self.set(view[:, :, :length])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row `i` of the batch what was row `rows[i]`."""
        view = self.view()
        if view is not None:
            self.set(view.index_select(0, rows.to(view.device)))

    def copy(self) -> TokenBuffer:
        """Return an independent buffer with the same tokens."""
        other = TokenBuffer(self.step)
        view = self.view()
        if view is not None:
            other.set(view)
        return other

    def checkpoint(self) -> tuple[torch.Tensor | None, int]:
        """Return what `restore` needs to undo changes made from now on."""
        return self._buffer, self.length

    def restore(self, checkpoint: tuple[torch.Tensor | None, int]) -> None:
        """Hold what was held at the checkpoint."""
        self._buffer, self.length = checkpoint

    def _move(self, kept: int, count: int, like: torch.Tensor) -> None:
        capacity = -(-count // self.step) * self.step
        shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        view = self.view()
        if kept and view is not None:
            buffer[:, :, :kept].copy_(view[:, :, self.length - kept :])
        self._buffer = buffer
