"""Which tokens of a layer stay when others are dropped, and where the remaining states differ."""

from __future__ import annotations

import torch

from kvq.errors import StatesError
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.packed_format import find_packed_format

_SHAPES = "[K], [B, K] or [B, H, K]"


def find_kept(keep: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """Return the positions of the tokens that stay, ascending.

    Args:
        keep: whole numbers `[K]`, `[B, K]` or `[B, H, K]`, positions from the layer's first token, in any order; or a
            boolean mask `[T]`, `[B, T]` or `[B, H, T]`, True for tokens that stay, equally many in every row and head.
        shape: of the states, `[B, H, T, D]`.
        name: the layer, for errors.

    Returns:
        int64 `[B, H, K]`, on the device of `keep`.

    Raises:
        StatesError: type, shape or a position is wrong, one is named twice, or counts differ.
    """
    if not isinstance(keep, torch.Tensor) or keep.is_floating_point() or keep.is_complex():
        found = keep.dtype if isinstance(keep, torch.Tensor) else type(keep).__name__
        raise StatesError(f"{name}: keep is {found}; a tensor of whole numbers {_SHAPES} or a boolean mask is needed")
    batch, heads, length = shape[:3]
    wide = _broadcast(keep, batch, heads, name)
    if keep.dtype is torch.bool:
        return _positions(wide, length, name)
    kept = wide.to(torch.int64).sort(dim=-1).values
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= length):
        raise StatesError(f"{name}: keep names tokens from {int(kept.min())} to {int(kept.max())}; there are {length}")
    if (kept[..., 1:] == kept[..., :-1]).any():
        raise StatesError(f"{name}: keep names a token twice")
    return kept


def _broadcast(keep: torch.Tensor, batch: int, heads: int, name: str) -> torch.Tensor:
    if not 1 <= keep.dim() <= 3:
        raise StatesError(f"{name}: keep has shape {list(keep.shape)}; {_SHAPES} is needed")
    wide = keep[(None,) * (3 - keep.dim())] if keep.dim() != 2 else keep[:, None]
    if wide.shape[0] not in (1, batch) or wide.shape[1] not in (1, heads):
        raise StatesError(
            f"{name}: keep has shape {list(keep.shape)}; the cache holds {batch} rows of {heads} heads: {_SHAPES}"
        )
    return wide.expand(batch, heads, -1)


def _positions(mask: torch.Tensor, length: int, name: str) -> torch.Tensor:
    if mask.shape[-1] != length:
        raise StatesError(f"{name}: the mask is for {mask.shape[-1]} tokens; there are {length}")
    counts = mask.sum(-1).flatten()
    if (counts != counts[0]).any():
        raise StatesError(
            f"{name}: the mask keeps {int(counts.min())} to {int(counts.max())} tokens; "
            "rows and heads must keep equally many"
        )
    kept: torch.Tensor = mask.nonzero()[:, -1].unflatten(0, (*mask.shape[:2], int(counts[0])))
    return kept


def check_padding_stays(kept: torch.Tensor, starts: tuple[int, ...], name: str) -> None:
    """Check that the left padding of every row stays: masks and sinks count from its end.

    Raises:
        StatesError: some of it would be dropped.
    """
    for row, start in enumerate(starts):
        expected = torch.arange(start, device=kept.device)
        if start and (kept.shape[-1] < start or (kept[row, :, :start] != expected).any()):
            raise StatesError(f"{name}: row {row} begins with {start} tokens of padding, which keep must name too")


def gather_tokens(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the tokens `[B, H, K, D]` of states `[B, H, T, D]` at positions `[B, H, K]`."""
    index = kept.to(states.device)[..., None].expand(-1, -1, -1, states.shape[-1])
    return states.gather(2, index)


def count_common(states: torch.Tensor, others: torch.Tensor) -> int:
    """Return how many of the first tokens of two `[B, H, T, D]` are equal to the bit in every row and head."""
    length = min(states.shape[2], others.shape[2])
    equal = (states[:, :, :length] == others[:, :, :length]).all(-1).all(0).all(0)
    differs = equal.logical_not().nonzero()
    return int(differs[0]) if len(differs) else length


def count_equal_ends(states: torch.Tensor, others: torch.Tensor) -> tuple[int, int]:
    """Return how many of the first and of the last tokens of two `[B, H, T, D]` are equal, as `count_common` does."""
    length = min(states.shape[2], others.shape[2])
    newest = (one[:, :, one.shape[2] - length :].flip(2) for one in (states, others))
    return count_common(states, others), count_common(*newest)


def gets_other_numbers(quantizer: object) -> bool:
    """Return whether moved tokens get other numbers, as far as is known: all but lines along a token find their codes.

    Those of a codebook need not: its scale may be a length, which rounding has changed.
    """
    packed = find_packed_format(quantizer)
    return packed is None or packed.has_codebook or packed.granularity is Granularity.PER_CHANNEL
