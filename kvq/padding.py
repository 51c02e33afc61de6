"""Left padding of a batch: what a mask says of it, and what states that came without a mask betray.

It must not know what a cache is.
"""

from __future__ import annotations

import torch


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
    if values.shape[0] < 2 or values.shape[2] < 2 or not values.numel():
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
