"""What a side holds, tensor by tensor: the one list from which reports, files and moves are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class Held(NamedTuple):
    """One tensor that is held.

    Attributes:
        role: what it is for, in a word: the memory report has a column for each role.
        tensor: the tensor as it is allocated.
        used: the share of its storage that is in use, 0 to 1; the rest is room for future tokens.
    """

    role: str
    tensor: torch.Tensor
    used: float = 1.0


class ExactPiece(Protocol):
    """States that a side keeps beside its store: an immutable value, except that a window may grow in place.

    Everything that holds sides calls these methods on every piece, so a new piece needs no call of its own.
    """

    def held(self) -> Iterator[Held]:
        """Yield every tensor that the piece holds."""

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that a file needs to have the piece again, by their names there."""

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return this piece, which is empty, with what `saved` of another one yielded.

        Args:
            tensors: the tensors of all pieces of a side by name, on the device of the states.
        """

    def select_rows(self, rows: torch.Tensor) -> Self:
        """Return the piece of a batch whose row `i` was row `rows[i]`, int64 `[B']`."""

    def moved_to(self, device: torch.device) -> Self:
        """Return the piece on a device."""

    def shared(self) -> Self:
        """Return a value with the same content that never writes to the tensors in it, so another side may hold it."""
