"""`KVQ` under `generate`: six families, and every mode that this release promises."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from kvq import KVQ, attach
from kvq.layer import KVQLayer

GREEDY = dict(max_new_tokens=24, do_sample=False)
EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=8, nbits_v=8, residual_length=32)


def new_tokens(output, prompt):
    return output[:, prompt.shape[1] :]


def test_tokens_equal_those_of_dynamic_cache_while_all_is_exact(model, prompts, assert_telling):
    reference = model.generate(prompts, **GREEDY)
    assert_telling(new_tokens(reference, prompts))
    cache = KVQ(**EXACT, model=model)
    assert torch.equal(model.generate(prompts, past_key_values=cache, **GREEDY), reference)
    assert cache.get_seq_length() == 300 + 23
    assert torch.equal(model.generate(prompts, past_key_values=KVQ(**EXACT), **GREEDY), reference), "without model="
    with attach(model, **EXACT):
        assert torch.equal(model.generate(prompts, **GREEDY), reference)


def test_quantized_tokens_follow_closely_and_memory_shrinks(model, prompts, assert_telling):
    reference = model.generate(prompts, **GREEDY)
    assert_telling(new_tokens(reference, prompts))
    cache = KVQ(**QUANTIZED, model=model)
    output = model.generate(prompts, past_key_values=cache, **GREEDY)
    assert (new_tokens(output, prompts)[:, :8] == new_tokens(reference, prompts)[:, :8]).all()
    assert cache.memory().compression > 2
    stored = [layer.side("key").store.length for layer in cache.layers if isinstance(layer, KVQLayer)]
    assert min(stored) >= 3 * 64, "at least three flushes"


def test_a_window_off_by_one_would_be_noticed(llama, prompts):
    cache = KVQ(**EXACT)
    llama.generate(prompts, past_key_values=cache, **GREEDY)
    reference = llama.generate(prompts, **GREEDY)
    cache = KVQ(**EXACT)
    llama.generate(prompts[:, :-1], past_key_values=cache, max_new_tokens=1, do_sample=False)
    for layer in cache.layers:
        layer.crop(-1)
    broken = llama.generate(prompts, past_key_values=cache, **GREEDY)
    for layer in cache.layers:
        layer.crop(-24)
        side = layer.side("value")
        side.window._buffer = side.window._buffer.roll(1, dims=2)
    again = llama.generate(prompts, past_key_values=cache, **GREEDY)
    assert torch.equal(broken, reference), "a second call continues the cache"
    assert not torch.equal(again, reference), "values shifted by one token"


def test_sampling_draws_the_same_tokens_while_all_is_exact(model, prompts, assert_telling):
    torch.manual_seed(3)
    reference = model.generate(prompts, do_sample=True, temperature=0.9, top_k=50, max_new_tokens=24)
    assert_telling(new_tokens(reference, prompts))
    torch.manual_seed(3)
    drawn = model.generate(
        prompts, do_sample=True, temperature=0.9, top_k=50, max_new_tokens=24, past_key_values=KVQ(**EXACT, model=model)
    )
    assert torch.equal(drawn, reference)


@pytest.mark.parametrize("way", ["cache", "attach"])
def test_left_padding(model, padded, way, assert_telling):
    reference = model.generate(**padded, **GREEDY)
    assert_telling(new_tokens(reference, padded["input_ids"]))
    for fields, same in ((EXACT, 24), (QUANTIZED, 6)):
        if way == "cache":
            output = model.generate(**padded, past_key_values=KVQ(**fields, model=model, padding=[41, 0]), **GREEDY)
        else:
            with attach(model, **fields) as attachment:
                output = model.generate(**padded, **GREEDY)
            assert attachment.cache.layers[0].side("key").sinks.starts == (41, 0)
        first = slice(300, 300 + same)
        assert torch.equal(output[:, first], reference[:, first])


def test_a_second_turn_on_the_same_cache(model, prompts, assert_telling):
    ours, theirs = KVQ(**EXACT, model=model), DynamicCache(config=model.config)
    history = prompts
    for _ in range(3):
        reference = model.generate(history, past_key_values=theirs, **GREEDY)
        output = model.generate(history, past_key_values=ours, **GREEDY)
        assert torch.equal(output, reference)
        history = torch.cat([output, prompts[:, :9]], dim=1)
    assert_telling(new_tokens(reference, prompts))


@pytest.mark.parametrize("fields", [EXACT, QUANTIZED], ids=["exact", "quantized"])
def test_chunked_prefill(model, prompts, fields):
    whole = KVQ(**fields, model=model)
    model.generate(prompts, past_key_values=whole, **GREEDY)
    reference = model.generate(prompts, **GREEDY)
    chunked = KVQ(**fields, model=model)
    output = model.generate(prompts, past_key_values=chunked, prefill_chunk_size=70, **GREEDY)
    same = 24 if fields is EXACT else 6
    assert torch.equal(output[:, : 300 + same], reference[:, : 300 + same])
    assert chunked.get_seq_length() == whole.get_seq_length()


@pytest.mark.parametrize("mode", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True, top_k=5)], ids=str)
def test_modes_that_change_the_batch(llama, prompts, mode, assert_telling):
    settings = {**GREEDY, **mode}
    torch.manual_seed(5)
    reference = llama.generate(prompts, **settings)
    assert_telling(new_tokens(reference, prompts))
    torch.manual_seed(5)
    assert torch.equal(llama.generate(prompts, past_key_values=KVQ(**EXACT), **settings), reference)


def test_half_precision_states_keep_their_dtype(prompts):
    from conftest import build_model

    model = build_model("llama", torch.bfloat16)
    cache = KVQ(backend="quanto", nbits_k=4, nbits_v=2)
    model.generate(prompts, past_key_values=cache, **GREEDY)
    keys, values = cache.materialize(0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.isfinite(keys).all()


def test_generation_through_the_generation_config(llama, prompts):
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with attach(llama, **EXACT) as attachment:
        output = llama.generate(prompts, generation_config=settings)
    assert output.shape[1] == 308
    assert attachment.cache.get_seq_length() == 307
