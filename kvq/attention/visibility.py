"""Which tokens each query sees: masks and causality, once for all attention that is written in torch.

It must not know how states are stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvq.attention.dispatch.request import AttentionRequest


def visible(request: AttentionRequest, start: int, stop: int) -> torch.Tensor | None:
    """Return the mask of the tokens from `start` to `stop`, or None where every query sees all of them.

    Returns:
        `[B or 1, Hq or 1, Tq or 1, stop - start]`, boolean (True: seen) or to be added to the scores; a view of the
        request's mask, where it has one.
    """
    if request.mask is not None:
        return with_four_dims(request.mask)[..., start:stop]
    if not request.is_causal:
        return None
    return causally_visible(request.query.shape[2], request.pair.key.length, start, stop, request.query.device)


def causally_visible(queries: int, length: int, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
    """Return the causal mask of the tokens from `start` to `stop`, or None where every query sees all of them.

    Args:
        queries: Tq; the queries stand at the last positions.
        length: Tk, all tokens.
        start: position of the first token.
        stop: position behind the last token.
        device: where the mask is made.

    Returns:
        bool `[1, 1, Tq, stop - start]`.
    """
    first = length - queries
    if stop <= first + 1:
        return None
    positions = torch.arange(start, stop, device=device)
    last_seen = torch.arange(first, length, device=device)
    return (positions <= last_seen[:, None])[None, None]


def hide_first(mask: torch.Tensor | None, hidden: int, request: AttentionRequest) -> AttentionRequest:
    """Return a request in which no query sees the first tokens.

    Args:
        mask: for the tokens behind them, as an `AttentionRequest` has it, or None where `is_causal` says it.
        hidden: tokens that no query sees, at least 1.
        request: the call, with any mask.
    """
    queries, length, device = request.query.shape[2], request.pair.key.length, request.query.device
    if mask is None:
        causal = causally_visible(queries, length, 0, length, device) if request.is_causal else None
        seen = torch.arange(length, device=device).expand(1, 1, queries, -1) >= hidden
        return replace(request, mask=seen if causal is None else seen & causal)
    behind = with_four_dims(mask)
    nothing = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
    before = behind.new_full((*behind.shape[:3], hidden), nothing)
    return replace(request, mask=torch.cat([before, behind], dim=-1))


def with_four_dims(mask: torch.Tensor) -> torch.Tensor:
    """Return a view of a mask that is broadcast to `[B, Hq, Tq, Tk]`, with all four dimensions."""
    return mask[(None,) * (4 - mask.dim())]


def to_additive(mask: torch.Tensor, dtype: torch.dtype, hidden: float) -> torch.Tensor:
    """Return a boolean mask as numbers to add: 0 where a token is seen, else `hidden`."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, hidden)
