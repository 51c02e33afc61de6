"""The ids of the tokens whose states a cache holds, as far as they are known.

A cache sees states and no tokens. It must not know layers; code that changes the layers must report to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvq.errors import StatesError


@dataclass(frozen=True, eq=False)
class TokenHistory:
    """Token ids, as they were given at one moment.

    Attributes:
        ids: int64 `[B, T]` on the CPU, never written to; they may go on behind the tokens held then.
        held: tokens that the cache held then, or holds by now if these are fewer.
    """

    ids: torch.Tensor
    held: int

    @classmethod
    def of(cls, ids: torch.Tensor, held: int) -> TokenHistory:
        """Take token ids.

        Raises:
            StatesError: they are not whole numbers `[B, T]`.
        """
        return cls(_checked(ids).clone(), held)

    def known(self, held: int) -> torch.Tensor:
        """Return the ids known for certain at this length; tokens with unknown ids may follow."""
        return self.ids[:, : self.held] if held > self.held else self.ids

    def common_prefix(self, ids: torch.Tensor, held: int) -> int:
        """Return how many tokens, of those that the cache holds, begin `ids` `[B, T]` in every row.

        Raises:
            StatesError: they are not whole numbers `[B, T]`, or of another batch.
        """
        given, own = _checked(ids), self.known(held)[:, :held]
        if given.shape[0] != own.shape[0]:
            raise StatesError(f"input_ids have {given.shape[0]} rows, the cache holds {own.shape[0]}")
        length = min(given.shape[1], own.shape[1])
        differs = (given[:, :length] != own[:, :length]).any(dim=0).nonzero()
        return int(differs[0]) if len(differs) else length

    def cropped(self, length: int) -> TokenHistory:
        """Return the history cut to `length` tokens."""
        return replace(self, ids=self.ids[:, :length], held=min(self.held, length))

    def select_rows(self, rows: torch.Tensor) -> TokenHistory:
        """Return the history of a batch whose row `i` was row `rows[i]`."""
        return replace(self, ids=self.ids[rows])


def _checked(ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype is torch.bool:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise StatesError(f"token ids are {found}; whole numbers [batch, tokens] are needed, a tensor")
    return ids.detach().to("cpu", torch.int64)
