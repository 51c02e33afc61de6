"""Layers of a quantizer that is slow take turns, so no step of decoding has to wait for all of them."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig

from kvq import KVQ
from kvq.layers.flush_delay import choose_delay
from kvq.planning import plan

LAYERS, RESIDUAL, FLUSH, DIM = 5, 8, 32, 16
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, hidden_size=2 * DIM, num_attention_heads=2, intermediate_size=8, vocab_size=9
)


def make_cache(**more):
    options = {"backend": "hqq", "nbits_k": 4, "nbits_v": 4, "q_group_size": FLUSH, "residual_length": RESIDUAL}
    return KVQ({**options, **more}, model=CONFIG)


def draw(tokens, seed=0):
    return torch.randn(2, 1, 2, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def feed(cache, states, layers=range(LAYERS)):
    for layer_idx in layers:
        cache.update(*states, layer_idx)


def stored(cache):
    return [layer.side("key").store.length for layer in cache.layers]


@pytest.mark.parametrize("length", [32, 64, 96, 160, 448])
def test_as_many_layers_as_a_flush_has_tokens_have_a_turn_each(length):
    turns = [choose_delay(layer_idx, length) for layer_idx in range(length)]
    assert sorted(turns) == list(range(length))
    assert turns[0] == 0
    few = sorted(turns[: length // 4])
    assert max(later - sooner for sooner, later in pairwise(few)) <= 8, "they come evenly"


def test_no_two_layers_quantize_in_one_step():
    cache, states = make_cache(), draw(RESIDUAL + 3 * FLUSH)
    feed(cache, states[:, :, :, : RESIDUAL + FLUSH])
    flushes = Counter()
    for step in range(RESIDUAL + FLUSH, states.shape[3]):
        before = stored(cache)
        feed(cache, states[:, :, :, step : step + 1])
        grown = [layer for layer, (old, new) in enumerate(zip(before, stored(cache), strict=True)) if new > old]
        assert len(grown) <= 1
        flushes.update(grown)
    assert all(1 <= flushes[layer] <= 2 for layer in range(LAYERS))


def test_layers_of_a_quantizer_that_is_local_to_groups_wait_for_nothing():
    for options in ({"backend": "native"}, {"backend_options": {"hqq": {"optimize": False}}}):
        cache = make_cache(**options)
        feed(cache, draw(RESIDUAL + 2 * FLUSH))
        assert stored(cache) == [2 * FLUSH] * LAYERS


def test_blocks_are_those_of_a_layer_without_a_delay_and_the_newest_tokens_exact():
    cache, states = make_cache(rotation_k="none", rotation_v="none"), draw(RESIDUAL + 4 * FLUSH)
    for start in range(0, states.shape[3], 5):
        feed(cache, states[:, :, :, start : start + 5])
    first = cache.layers[0].materialize()
    for layer_idx in range(1, LAYERS):
        length, layer = stored(cache)[layer_idx], cache.layers[layer_idx]
        assert length == 3 * FLUSH, "one block less than in the first layer, whose turn was before"
        assert layer.flush_delay == choose_delay(layer_idx, FLUSH) > 0
        for found, other, given in zip(layer.materialize(), first, states, strict=True):
            assert torch.equal(found[:, :, length:], given[:, :, length:])
            assert torch.equal(found[:, :, :length], other[:, :, :length])
            assert not torch.equal(found[:, :, :length], given[:, :, :length])


def test_copies_and_files_keep_the_turns(tmp_path):
    cache, states = make_cache(), draw(RESIDUAL + FLUSH + 20)
    feed(cache, states)
    cache.save(tmp_path / "cache.safetensors")
    copies = cache.fork(), KVQ.load(tmp_path / "cache.safetensors", model=CONFIG)
    for copy in (cache, *copies):
        feed(copy, draw(FLUSH, seed=1))
    assert len(set(stored(cache))) == 2, "some layers have had their turn and some have not"
    assert all(stored(copy) == stored(cache) for copy in copies)


def test_a_crop_leaves_what_single_tokens_make():
    cache, slow, states = make_cache(), make_cache(), draw(RESIDUAL + 2 * FLUSH + 9)
    cache.activate_past_recording()
    feed(cache, states)
    cache.crop(-9)
    for step in range(states.shape[3] - 9):
        feed(slow, states[:, :, :, step : step + 1])
    assert stored(cache) == stored(slow)
    assert len(set(stored(cache))) == 2


@pytest.mark.parametrize("context", [RESIDUAL + FLUSH + 3, RESIDUAL + 2 * FLUSH + 17])
def test_a_plan_knows_the_turns(context):
    cache = make_cache()
    feed(cache, draw(context))
    held = cache.memory()
    assert len({layer.total_bytes for layer in held.layers}) == 2
    assert plan(CONFIG, cache.config, context=context, dtype=torch.float32).total_bytes == held.total_bytes
