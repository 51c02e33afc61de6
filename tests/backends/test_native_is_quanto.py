"""Native stores what quanto stores, bit for bit, at every width that quanto has: it can take its place."""

from __future__ import annotations

import pytest
import torch

from kvq import KVQ

STEPS = {
    "as by default": {},
    "plain": dict.fromkeys(("rotation_k", "rotation_v", "balance_k", "balance_v", "clip_k", "clip_v"), "none"),
}


def draw_states(kind, dtype):
    states = torch.randn(2, 3, 200, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 64)
    if kind == "biased":
        states = states + 40 * torch.arange(64).cos()
    if kind == "constant":
        states[:, :, :128, ::3] = 2.5
    return states.to(dtype)


def stored(backend, states, **fields):
    cache = KVQ(residual_length=0, backend=backend, **fields)
    cache.update(states, states.flip(-1), 0)
    return [
        (name, part)
        for side in ("key", "value")
        for segment in cache.layers[0].side(side).store.segments
        for name, part in segment.parts.items()
    ]


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["per_channel", "per_token"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("kind", "dtype"), [("normal", torch.bfloat16), ("biased", torch.float32), ("constant", None)])
def test_it_stores_what_quanto_stores(nbits, axis, steps, kind, dtype):
    pytest.importorskip("optimum.quanto")
    states = draw_states(kind, dtype or torch.float32)
    fields = {"nbits_k": nbits, "nbits_v": nbits, "axis_key": axis, "axis_value": axis, **STEPS[steps]}
    own, theirs = stored("native", states, **fields), stored("quanto", states, **fields)
    assert [name for name, _ in own] == [name for name, _ in theirs] != []
    for (name, one), (_, other) in zip(own, theirs, strict=True):
        assert torch.equal(one, other), name
