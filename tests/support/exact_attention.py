"""Attention by its definition, in float64, over the states that a request's sides decode to."""

import torch


def attend(request):
    """Return the output `[B, Tq, Hq, D_v]` of a request without a mask; the newest tokens are its queries."""
    keys, values = (
        side.materialize().double().repeat_interleave(request.queries_per_head, dim=1)
        for side in (request.pair.key, request.pair.value)
    )
    scores = request.query.double() @ keys.mT * request.scaling
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)
