"""What libraries do with a cache as with any object: iterate, index, copy, pickle, compare, flatten, export."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache, EncoderDecoderCache

from kvq import KVQ
from kvq.cache.encoder_decoder import EncoderDecoderKVQ
from kvq.errors import CacheStateError

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)


def draw(tokens=200, seed=0):
    return torch.randn(2, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def fill(cache, layers=2):
    for layer in range(layers):
        cache.update(*draw(seed=layer), layer)
    return cache


def hybrid():
    return transformers.Gemma2Config(**SIZES, num_hidden_layers=2, sliding_window=16, head_dim=16)


@pytest.mark.case("`for keys, values, *_ in cache`, `DynamicCache(list(cache))`", "as with `DynamicCache`")
@pytest.mark.parametrize("config", [None, hybrid()], ids=["plain", "sliding and full"])
def test_it_yields_what_dynamic_cache_yields(config):
    cache = fill(KVQ(model=config, residual_length=256))  # nothing is quantized yet
    plain = fill(DynamicCache() if config is None else DynamicCache(config=config))
    for own, theirs in zip(cache, plain, strict=True):
        assert len(own) == len(theirs) == 3
        assert torch.equal(own[0], theirs[0])
        assert torch.equal(own[1], theirs[1])
        assert (own[2] is None) == (theirs[2] is None)
        assert own[2] is None or torch.equal(own[2], theirs[2])
    assert len(cache) == len(plain) == 2


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_a_dynamic_cache_is_made_of_it(kind):
    cache = fill(KVQ())
    plain = DynamicCache(kind(cache))
    for layer in range(2):
        keys, values = cache.materialize(layer)
        assert torch.equal(plain.layers[layer].keys, keys)
        assert torch.equal(plain.layers[layer].values, values)
    plain.update(*draw(3), 0)
    assert plain.get_seq_length() == 203
    assert cache.get_seq_length() == 200


def test_layers_without_states_yield_none():
    assert [row[:2] for row in KVQ(model=transformers.LlamaConfig(**SIZES, num_hidden_layers=2))] == [(None, None)] * 2
    assert list(KVQ()) == []


def test_both_halves_of_an_encoder_decoder_cache():
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    cache = EncoderDecoderKVQ(model=config, residual_length=256)
    fill(cache.self_attention_cache)
    fill(cache.cross_attention_cache)
    plain = EncoderDecoderCache(list(cache))
    assert [len(row) for row in cache] == [6, 6]
    assert torch.equal(plain.self_attention_cache.layers[1].values, cache.materialize(1)[1])
    assert torch.equal(plain.cross_attention_cache.layers[1].keys, draw(seed=1)[0])
    with pytest.raises(CacheStateError, match=r"cache\.materialize"):
        cache[0]


@pytest.mark.case("`cache[0]`, `cache[0][0].shape`", "CacheStateError names `cache.materialize(layer_idx)`")
def test_it_is_no_tuple():
    with pytest.raises(CacheStateError, match=r"cache\[-1\] is not supported; cache\.materialize\(layer_idx\)"):
        fill(KVQ())[-1]
    for name in ("key_cache", "value_cache", "to_legacy_cache", "from_legacy_cache"):
        assert hasattr(KVQ(), name) is hasattr(DynamicCache(), name)


def test_it_is_true_equal_and_contained_as_dynamic_cache_is():
    for kind in (KVQ, DynamicCache):
        cache = fill(kind())
        assert cache
        assert not kind()
        assert cache == cache
        assert cache != copy.copy(cache)
        assert cache in [cache]


def test_flattening_leaves_it_whole():
    """As `DynamicCache` is, unless somebody registers that one for export."""
    cache = fill(KVQ())
    leaves, spec = tree_flatten({"past_key_values": cache, "others": [1]})
    assert leaves[0] is cache
    assert tree_unflatten(leaves, spec)["past_key_values"] is cache


def test_export_refuses_it_by_name():
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.ones(1, 5, dtype=torch.long), "past_key_values": KVQ(model=model)}
    with pytest.raises(Exception, match="KVQ"):
        torch.export.export(model, (), inputs, strict=False)


class Reading(torch.nn.Module):
    """Makes a cache of its own within its forward."""

    def forward(self, states):
        return KVQ(backend="native").update(states, states, 0)[0]


@pytest.mark.case("`torch.export` of a model that fills a KVQ", "CacheStateError")
def test_a_forward_that_fills_one_is_not_exported():
    with pytest.raises(CacheStateError, match=r"torch\.export"):
        torch.export.export(Reading(), (draw(100)[0],), strict=False)


def save_and_load(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),  # noqa: S301  # our own bytes
    "torch.save": save_and_load,
    "deepcopy": copy.deepcopy,
    "fork": KVQ.fork,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("config", [None, hybrid()], ids=["plain", "sliding and full"])
def test_copies_go_on_by_themselves(copied, config):
    cache = fill(KVQ(model=config))
    cache.token_ids = torch.arange(200)[None]
    other = copied(cache)
    assert torch.equal(other.token_ids, cache.token_ids)
    for layer in range(2):
        other.update(*draw(150, seed=5), layer)
    assert (cache.get_seq_length(), other.get_seq_length()) == (200, 350)
    again = fill(KVQ(model=config))
    for layer in range(2):
        again.update(*draw(150, seed=5), layer)
    for layer in range(2):
        assert all(map(torch.equal, other.materialize(layer), again.materialize(layer)))


def test_a_shallow_copy_shares_its_layers_as_that_of_dynamic_cache():
    for kind in (KVQ, DynamicCache):
        cache = fill(kind())
        copied = copy.copy(cache)
        copied.update(*draw(3), 0)
        assert cache.get_seq_length() == copied.get_seq_length() == 203


def test_float64_is_refused_at_the_first_update():
    cache = KVQ()
    with pytest.raises(
        ValueError, match=r"torch\.float64 cannot be quantized; .* torch\.float32: load the model in one"
    ):
        cache.update(*draw().double(), 0)
    assert len(cache) == 0
