"""What an update does beside storing its token is the same for any number of layers and of chunks."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch
import transformers

from kvq import KVQ
from kvq.attention.handle import PackedStates

HEADS, DIM = 1, 8
FLUSH = 64


@contextmanager
def counted_calls():
    """Count every call of Python or C, and every turn of a generator, in the block."""
    found = {"calls": 0}

    def count(_frame, event, _argument):
        found["calls"] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(before)


def filled(layers, tokens):
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=HEADS, hidden_size=DIM, vocab_size=9, attn_implementation="kvq"
    )
    cache = KVQ(backend="native", residual_length=0, model=config)
    states = torch.randn(1, HEADS, tokens, DIM)
    for layer in range(layers):
        cache.update(states, states, layer)
    return cache


def calls_of_one_token(cache):
    """Return the calls of the update of the first and of the last layer, after which nothing was quantized."""
    token, counts = torch.randn(1, HEADS, 1, DIM), []
    for warm in (True, False):
        for index in range(len(cache.layers)):
            stored = cache.layers[index].side("key").store.length
            with counted_calls() as found:
                keys, _ = cache.update(token, token, index)
            assert isinstance(keys, PackedStates)
            assert cache.layers[index].side("key").store.length == stored
            if not warm:
                counts.append(found["calls"])
    return counts[0], counts[-1]


@pytest.mark.case("32 layers with 16k tokens, 80 layers with 32k", "an update costs the same at any of them")
def test_a_token_costs_as_many_calls_after_more_layers_and_more_chunks():
    sizes = [(layers, tokens) for layers in (2, 24) for tokens in (2 * FLUSH, 60 * FLUSH)]
    caches = {size: filled(*size) for size in sizes}
    chunks = {size: len(cache.layers[0].side("key").store.segments) for size, cache in caches.items()}
    assert chunks[2, 60 * FLUSH] > chunks[2, 2 * FLUSH] + 2
    first, last = zip(*(calls_of_one_token(cache) for cache in caches.values()), strict=True)
    assert len(set(first)) == 1, dict(zip(sizes, first, strict=True))
    assert len(set(last)) == 1, dict(zip(sizes, last, strict=True))


def test_the_counter_sees_a_sum_over_chunks():
    with counted_calls() as few:
        sum(one for one in range(3))
    with counted_calls() as many:
        sum(one for one in range(30))
    assert many["calls"] - few["calls"] == 27


def test_the_length_follows_the_chunks_through_every_change():
    cache = filled(1, 40 * FLUSH)
    side = cache.layers[0].side("key")
    view = side.store.view()
    assert view.length == side.store.length == 40 * FLUSH
    for change in (
        lambda: cache.crop(-100),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([1])),
        lambda: cache.update(*[torch.randn(1, HEADS, 3 * FLUSH, DIM)] * 2, 0),
        lambda: cache.move_to("cpu"),
    ):
        change()
        store = cache.layers[0].side("key").store
        counted = sum(segment.used for segment in store.segments) * store.block_length
        assert store.length == store.view().length == counted
        assert store.shared().length == counted
    assert view.length == 40 * FLUSH
