"""Many queries at once, as in chunked prefill: the history is decoded block by block for matrix products.

Each piece of the history goes through torch's own flash attention, and the outputs are merged by the logarithms of
their sums: never more than one piece is decoded at a time. It must not know how states are stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.stored_pieces import piece_length
from kvq.attention.visibility import to_additive, visible
from kvq.store.side import SideView

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BlockwiseKernel:
    """Decodes a piece of the history at a time and attends to it with torch's flash attention for processors."""

    name = "blockwise"
    device_types = frozenset({"cpu"})
    needs_benchmark = False

    def why_unavailable(self) -> str | None:
        """Return None: torch is all that it needs."""
        return None

    def why_unsupported(self, request: AttentionRequest) -> str | None:
        """Return the part of the request that it does not serve."""
        pair, query = request.pair, request.query
        if query.shape[2] == 1:
            return "serves several queries at a time"
        if request.softcap is not None:
            return "does not cap scores"
        if pair.key.like.shape[3] != pair.value.like.shape[3]:
            return "serves keys and values of one head dim"
        dtype = request.common_dtype
        return None if dtype in _DTYPES else f"does not compute in {dtype}"

    def attend(self, request: AttentionRequest) -> torch.Tensor:
        """Return the output `[B, Tq, Hq, D_v]` in the dtype of the query."""
        batch, query_heads, queries, _ = request.query.shape
        heads, sharing = query_heads // request.queries_per_head, request.queries_per_head
        merged, all_queries = _Merged(request, heads, sharing), request.query.to(request.common_dtype)
        for keys, values, start in _iterate_states(request):
            mask = _mask_of(request, start, start + keys.shape[2])
            for place in range(sharing):
                # Query heads `place`, `place + sharing`, ...: one for each key-value head.
                query = all_queries[:, place::sharing]
                own_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, place::sharing]
                merged.add(place, *_attend_piece(query, keys, values, own_mask, request.scaling))
        output = merged.output.reshape(batch, heads, sharing, queries, -1).flatten(1, 2)
        return output.transpose(1, 2).to(request.query.dtype).contiguous()


class _Merged:
    """Outputs of pieces, weighted by their shares of the softmax.

    Attributes:
        output: fp32 `[B, H, queries per head, Tq, D_v]`.
        logarithm: fp32 `[B, H, queries per head, Tq]`, of the sum of all exponentials so far.
    """

    def __init__(self, request: AttentionRequest, heads: int, sharing: int) -> None:
        batch, _, queries, _ = request.query.shape
        shape = (batch, heads, sharing, queries)
        like = request.pair.value.like
        self.output = torch.zeros((*shape, like.shape[3]), dtype=torch.float32, device=like.device)
        self.logarithm = self.output.new_full(shape, -torch.inf)
        if request.sink_logits is not None:
            self.logarithm = request.sink_logits.float().reshape(1, heads, sharing, 1).expand(shape).clone()

    def add(self, place: int, output: torch.Tensor, logarithm: torch.Tensor) -> None:
        """Take the output `[B, H, Tq, D_v]` of one piece and the logarithm `[B, H, Tq]` of its sum."""
        before = self.logarithm[:, :, place]
        # A row that sees no token of a piece has a sum of 0 and a meaningless output.
        unseen = logarithm == -torch.inf
        after = torch.logaddexp(before, logarithm)
        base = after.masked_fill(after == -torch.inf, 0)
        own = self.output[:, :, place]
        own.mul_((before - base).exp_()[..., None])
        share = (logarithm - base).exp_()[..., None]
        own.add_(output.float().mul_(share).masked_fill_(unseen[..., None], 0))
        self.logarithm[:, :, place] = after


def _attend_piece(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, Tq, D_v]` of one piece and the logarithm `[B, H, Tq]` of its sum."""
    output, logarithm = _FLASH(query, keys, values, attn_mask=mask, scale=scaling)
    if mask is None:
        return output, logarithm
    # torch 2.6 to 2.13 says 0, a sum of 1, of a row that sees no token.
    return output, logarithm.masked_fill((mask == -torch.inf).all(-1), -torch.inf)


def _iterate_states(request: AttentionRequest) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield keys and values of the history in pieces, then the exact tokens, each with its first position."""
    pair, stored, length, dtype = request.pair, request.stored_length, piece_length(request.pair), request.common_dtype
    for start in range(0, stored, length):
        count = min(length, stored - start)
        yield _decode(pair.key, start, count, dtype), _decode(pair.value, start, count, dtype), start
    yield _exact(pair.key, dtype), _exact(pair.value, dtype), stored


def _decode(side: SideView, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    like = side.like
    states = like.new_empty((like.shape[0], like.shape[1], count, like.shape[3]), dtype=dtype)
    side.decode_into(states, start)
    return states


def _exact(side: SideView, dtype: torch.dtype) -> torch.Tensor:
    states = side.window if side.new is None else torch.cat([side.window, side.new], dim=2)
    return states.to(dtype)


def _mask_of(request: AttentionRequest, start: int, stop: int) -> torch.Tensor | None:
    """Return the additive mask of tokens `[B or 1, Hq or 1, Tq, T]` in the common dtype, or None: all is seen."""
    mask = visible(request, start, stop)
    if mask is None:
        return None
    mask = mask.expand(-1, -1, request.query.shape[2], -1)
    if mask.dtype != torch.bool:
        return mask.to(request.common_dtype)
    return None if mask.all() else to_additive(mask, request.common_dtype, -torch.inf)
