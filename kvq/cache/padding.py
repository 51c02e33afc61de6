"""Left padding of a batch, given by the user, read from a mask, or noticed in states without one.

It must not know what a cache is.
"""

from __future__ import annotations

import torch

from kvq.user_warnings import warn_user


class BatchPadding:
    """The left padding of one batch, from before its first tokens until it is forgotten.

    Args:
        given: tokens of left padding in each row, from the user or a file; None to learn them from the first mask.

    Attributes:
        counts: tokens of left padding in each row; None: no padding, as far as is known.
        is_settled: whether it can no longer change, since it was given or tokens are held.
    """

    def __init__(self, given: tuple[int, ...] | None) -> None:
        self.counts: tuple[int, ...] | None = given
        self.is_settled = self._was_given = given is not None
        self._has_seen_mask = False

    def learn(self, attention_mask: torch.Tensor | None) -> None:
        """Take the padding from the mask `[B, T]` of the first forward, unless it is settled; None: no padding."""
        if self.is_settled:
            return
        self._has_seen_mask = True
        found = left_padding(attention_mask)
        self.counts = None if found is None else tuple(found)
        if attention_mask is not None and found is not None and max(found) == attention_mask.shape[1]:
            warn_user(
                "a row of this batch begins with a whole chunk of left padding, so how much follows is not known: the "
                "rest of it will shape the scales of real tokens. Pass padding=[tokens, ...] to KVQ, or use "
                "attach(model)"
            )

    def settle(self, first_values: torch.Tensor | None = None) -> None:
        """Keep the padding as it is known: tokens are held now.

        Args:
            first_values: `[B, H, T, D]`, the first values of the first layer; warns where they look left-padded and no
                mask was seen. None where there is nothing to judge by.
        """
        if self.is_settled:
            return
        self.is_settled = True
        if first_values is not None and not self._has_seen_mask and looks_padded(first_values):
            warn_user(
                "the rows of this batch seem to be padded on the left, which this cache cannot see under an attention "
                "other than 'kvq': padding then shapes the scales of real tokens. Pass padding=[tokens, ...] to KVQ "
                "(zeros where there is none), or use attach(model)"
            )

    def forget(self) -> None:
        """Forget the padding, and learn that of the next batch."""
        self.counts = None
        self.is_settled = self._was_given = self._has_seen_mask = False

    def forget_learnt(self) -> bool:
        """Forget the padding unless it was given; return whether it was forgotten."""
        if not self._was_given:
            self.forget()
        return not self._was_given


def left_padding(attention_mask: object) -> list[int] | None:
    """Return the tokens of left padding in each row of a mask `[B, T]`, or None where there are none."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    padding: list[int] = (attention_mask != 0).int().cumsum(-1).eq(0).sum(-1).tolist()
    return padding if any(padding) else None


def looks_padded(values: torch.Tensor) -> bool:
    """Return whether the rows of a batch begin with different numbers of equal tokens, as left padding does.

    The values of a model's first layer depend on the token alone, or on the token and a position that padding shares.
    So a row of padding is a row of equal values.

    Args:
        values: `[B, H, T, D]`, of the first layer and the first tokens.
    """
    if values.shape[0] < 2 or values.shape[2] < 2 or not values.numel() or values.is_meta:
        return False
    first = values[:, :, :1]
    # Products in another order may differ in the last bits; other tokens differ in the first.
    bound = 1e-2 * first.float().abs().amax(dim=(1, 2, 3))
    if not bool((_difference(values[:, :, 1:2], first)[:, 0] <= bound).any()):
        return False
    equal = _difference(values, first) <= bound[:, None]
    runs = equal.int().cumprod(dim=1).sum(dim=1)
    return bool((runs != runs[0]).any())


def _difference(values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return how far each token is from the first of its row, `[B, T]`."""
    return (values.float() - first.float()).abs().amax(dim=(1, 3))
