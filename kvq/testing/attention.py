"""Attention over one stored layer in the ways that models ask for it, against float64 on the states it decodes to.

It must not know how a difference is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.testing.case import STEPS, ContractCase, quantized_layer

FLUSHES = 2
BATCH = 3
SHARING = 2
"""Query heads for each key-value head."""
PADDING = 9
"""Tokens that the mask hides from the first row."""
WAYS = {
    "one query": (1, False, None),
    "5 queries at once": (5, False, None),
    "left padding": (1, True, None),
    "5 queries at once and left padding": (5, True, None),
    "reordered rows": (1, False, (2, 0, 0)),
    "5 queries at once, left padding and reordered rows": (5, True, (2, 0, 0)),
}
"""Queries, whether there is padding, and the order of the rows of the batch."""
CORE_STEPS = {**dict.fromkeys(STEPS, "auto"), "rotation_k": "hadamard", "rotation_v": "hadamard"}
"""All that the core can do to states before a quantizer gets them."""


def measure_attention(case: ContractCase) -> Iterator[tuple[str, float]]:
    """Yield each kind of request, and the error of its output as a share of the largest number of float64."""
    for way, (queries, is_padded, order) in WAYS.items():
        yield from _measure(way, make_request(case, queries, is_padded=is_padded, order=order))
    way, (queries, is_padded, order) = next(reversed(WAYS.items()))
    request = make_request(case, queries, is_padded=is_padded, order=order, **CORE_STEPS)
    yield from _measure(f"{way}, rotated, and balanced and clipped where that can be", request)


def _measure(way: str, request: AttentionRequest) -> Iterator[tuple[str, float]]:
    chosen, expected = get_kernel_registry().choose(request).kernel, _attend_in_float64(request)
    for kernel in {kernel.name: kernel for kernel in (chosen, REFERENCE)}.values():
        difference = (kernel.attend(request).double() - expected).abs().max() / expected.abs().max()
        yield f"{way}, kernel {kernel.name!r}", float(difference)


def make_request(
    case: ContractCase, queries: int, *, is_padded: bool, order: tuple[int, ...] | None, **fields: Any
) -> AttentionRequest:
    """Return a step of `queries` tokens on a layer with some tokens stored and some in the window.

    Args:
        case: whose backend stores them.
        queries: tokens of the step.
        is_padded: whether a mask hides the first tokens of the first row.
        order: the rows of the batch in their new order, or None.
        fields: fields of the configuration of the cache.
    """
    layer = quantized_layer(case.filled_cache(case.tokens_for(FLUSHES), batch=BATCH, seed=90, **fields))
    if order is not None:
        layer.reorder_cache(torch.tensor(order))
    keys, values = (case.states(queries, batch=BATCH, seed=seed) for seed in (92, 93))
    handle, _ = layer.update(keys, values, packed=True)
    query = case.states(queries, batch=BATCH, heads=SHARING * keys.shape[1], seed=94)
    scaling = query.shape[3] ** -0.5
    # `packed` made `update` return a handle, which leads to the pair.
    pair = handle.pair  # type: ignore[attr-defined]  # declared as any tensor
    return AttentionRequest(query, pair, _seen(pair.key.length, queries, query) if is_padded else None, scaling)


def _seen(total: int, queries: int, like: torch.Tensor) -> torch.Tensor:
    """Return a causal mask, bool `[B, 1, Tq, Tk]`, that hides the first tokens of the first row."""
    seen = torch.ones(BATCH, 1, queries, total, dtype=torch.bool, device=like.device).tril(total - queries)
    seen[0, :, :, :PADDING] = False
    return seen


def _attend_in_float64(request: AttentionRequest) -> torch.Tensor:
    """Return the output `[B, Tq, Hq, D]` of attention over the decoded states."""
    keys, values = (
        side.materialize().double().repeat_interleave(request.queries_per_head, dim=1)
        for side in (request.pair.key, request.pair.value)
    )
    scores = request.query.double() @ keys.transpose(2, 3) * request.scaling
    queries, total = scores.shape[2:]
    seen = torch.ones(queries, total, dtype=torch.bool, device=scores.device).tril(total - queries)
    seen = seen if request.mask is None else request.mask
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)
