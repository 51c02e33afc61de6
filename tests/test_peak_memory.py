"""Transient memory of a prefill, counted from the allocator's own events by torch's profiler."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer

MIB = 2**20


def peak_above_held(tokens, chunk, batch=1, **fields):
    """Largest number of bytes alive at once in a prefill beyond those alive after it; the states themselves apart."""
    keys, values = torch.randn(2, batch, 4, tokens, 128).bfloat16()
    layer = KVQLayer(0, KVQCacheConfig(**fields).for_layer(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for start in range(0, tokens, chunk):
            layer.update(keys[:, :, start : start + chunk], values[:, :, start : start + chunk], packed=True)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert layer.side("key").store.length >= tokens - 192
    assert alive > 0, "the profiler saw what the layer holds"
    return peak - alive


@pytest.mark.parametrize(
    "fields", [{}, {"nbits_k": 8, "nbits_v": 8, "rotation_k": "hadamard"}], ids=["defaults", "8 bit"]
)
@pytest.mark.case(
    "the peak of memory while a long prompt is quantized",
    "some MiB above the finished cache, at 8k and at 16k tokens",
    report="ml-explore/mlx-lm#1587",
)
def test_a_prefill_takes_mebibytes_whatever_its_length(fields):
    """At 8 heads, D 128 and bf16 the same count gave 17 MiB at 8k and at 32k, where the states take 32 and 128."""
    whole = {tokens: peak_above_held(tokens, tokens, **fields) for tokens in (8192, 16384)}
    assert whole[16384] <= 24 * MIB
    assert whole[16384] <= whole[8192] + 2 * MIB
    assert peak_above_held(8192, 512, **fields) <= 24 * MIB


def test_a_prefill_takes_mebibytes_whatever_its_batch():
    assert peak_above_held(2048, 2048, batch=8) <= 24 * MIB


def test_a_copy_of_the_states_would_be_noticed(monkeypatch):
    from kvq.store.side import LayerSide

    original = LayerSide.append
    monkeypatch.setattr(LayerSide, "append", lambda self, new, count: original(self, new.clone(), count))
    tokens = 32768
    assert peak_above_held(tokens, tokens) > 24 * MIB
