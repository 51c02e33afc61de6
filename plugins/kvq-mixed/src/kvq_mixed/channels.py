"""Which channels get 4 bits, and how they are stored beside the others: every stored channel has 2 bits."""

from __future__ import annotations

import torch

from kvq.plugin_api import LayerStatistics

SHARE = 8
"""One channel of so many has 4 bits."""


def count_wide(head_dim: int) -> int:
    """Return how many channels of a head have 4 bits, at least one."""
    return max(1, head_dim // SHARE)


def choose_channels(
    statistics: LayerStatistics | None, num_heads: int, head_dim: int, *, by_scores: bool = True
) -> torch.Tensor:
    """Return the channels of each head that get 4 bits, int64 `[H, C]`, ascending.

    An error of a channel costs the scores in proportion to what queries make of it, and grows with the channel's range:
    E[q^2] * range^2, the range that of the whole text. Values have no queries; their own range decides. Without
    statistics the channels are spread evenly.

    Args:
        statistics: those of the side, or None.
        num_heads: key-value heads (H).
        head_dim: elements of one head.
        by_scores: whether what queries make of a channel counts, and not its range alone.
    """
    count = count_wide(head_dim)
    if statistics is None:
        return (torch.arange(count) * head_dim // count).expand(num_heads, count)
    cost = (statistics.maximum - statistics.minimum).square()
    if by_scores and statistics.query_moment is not None:
        cost = cost * statistics.query_moment.diagonal(dim1=-2, dim2=-1)
    # Sorted, not `topk`: of equal channels the first ones are taken, on every machine.
    return cost.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values


def list_sources(wide: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the element that each stored channel adds to, int32 `[H, D + C]`.

    First all channels, in order; then the wide ones once more, for their lower two bits.
    """
    own = torch.arange(head_dim).expand(len(wide), head_dim)
    return torch.cat([own, wide], dim=1).to(torch.int32)
