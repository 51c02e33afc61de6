"""Two quantizers that are not affine, through the same store, cache and generation."""

import copy

import pytest
import torch
from reference_quantizers import NORM_CODEBOOK, STATIC_FLOAT8

from kvq import KVQ, attach, register_backend
from kvq.errors import ConfigError

GREEDY = dict(max_new_tokens=24, do_sample=False)
CASES = {"norm_codebook": dict(nbits_k=4, nbits_v=4), "static_float8": dict(nbits_k=8, nbits_v=8)}
BITS = {"norm_codebook": 4 + 16 / 64, "static_float8": 8.0}


@pytest.fixture(params=CASES)
def fields(request):
    register_backend(NORM_CODEBOOK, replace=True)
    register_backend(STATIC_FLOAT8, replace=True)
    return dict(backend=request.param, residual_length=128, **CASES[request.param])


def test_it_generates(llama, prompts, fields, assert_telling):
    reference = llama.generate(prompts, **GREEDY)
    assert_telling(reference[:, 300:])
    cache = KVQ(**fields)
    output = llama.generate(prompts, past_key_values=cache, **GREEDY)
    assert (output == reference)[:, 300].all()
    stored = cache.layers[0].side("key").store
    assert stored.length >= 128
    memory = cache.memory()
    assert memory.effective_bits_key == pytest.approx(BITS[fields["backend"]], rel=0.01)
    assert memory.constant_bytes > 0
    with attach(llama, **{**fields, "residual_length": 2048}):
        assert torch.equal(llama.generate(prompts, **GREEDY), reference)


def test_the_error_is_that_of_the_representation(fields):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 400, 64)
    cache = KVQ(**fields)
    cache.update(keys, values, 0)
    held, _ = cache.materialize(0)
    stored = cache.layers[0].side("key").store.length
    error = (held - keys)[:, :, 4:stored].norm() / keys[:, :, 4:stored].norm()
    assert 0.01 < error < (0.13 if fields["backend"] == "norm_codebook" else 0.04)
    assert torch.equal(held[:, :, -128:], keys[:, :, -128:])


def test_sides_may_have_unlike_representations(llama, prompts, fields):
    mixed = KVQ(backend={"key": fields["backend"], "value": "quanto"}, nbits_k=fields["nbits_k"], nbits_v=4)
    llama.generate(prompts, past_key_values=mixed, **GREEDY)
    key, value = (mixed.layers[0].side(name).store for name in ("key", "value"))
    assert key.length == value.length > 0
    assert key.length % value.block_length == 0


def test_cache_operations_need_nothing_more(llama, prompts, fields):
    cache = KVQ(**fields)
    llama.generate(prompts, past_key_values=cache, **GREEDY)
    copied, forked = copy.deepcopy(cache), cache.fork()
    for other in (copied, forked):
        assert torch.equal(other.materialize(1)[0], cache.materialize(1)[0])
    forked.crop(-250)
    forked.reorder_cache(torch.tensor([1, 0]))
    expected = cache.materialize(0)[0][[1, 0], :, :73]
    assert torch.equal(forked.materialize(0)[0], expected)


@pytest.mark.parametrize("change", [{"clip_k": 0.9}, {"balance_k": "rms"}], ids=lambda one: next(iter(one)))
def test_what_the_core_does_to_states_is_refused(fields, change):
    cache = KVQ(**{**fields, "axis_key": "per_channel", **change})
    with pytest.raises(ConfigError, match=next(iter(change))):
        cache.update(torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 64), 0)
