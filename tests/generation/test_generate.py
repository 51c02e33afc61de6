"""`KVQ` under `generate`: six families, and every mode that this release promises."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from kvq import KVQ, attach
from kvq.layers.quantized_layer import KVQLayer

GREEDY = dict(max_new_tokens=24, do_sample=False)
EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=8, nbits_v=8, residual_length=32)
BOUND = 0.1
"""Largest difference of a logit as a share of their range; the families show 0.004 to 0.073 at 8 bits, 0.34 up at 2."""


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


def test_quantized_logits_follow_and_memory_shrinks(model, prompts, assert_telling, forced, compare):
    text = model.generate(prompts, **GREEDY)
    assert_telling(new_tokens(text, prompts))
    reference = forced(model, text, DynamicCache(config=model.config))
    cache = KVQ(**QUANTIZED, model=model)
    difference, agreement = compare(forced(model, text, cache), reference)
    assert difference <= BOUND
    assert agreement >= 0.95
    slides = cache.layers[0].is_sliding  # a window of 250 tokens, and up to 63 tokens behind it
    assert cache.memory().compression > (1.3 if slides else 1.5)
    stored = [layer.side("key").store.length for layer in cache.layers if isinstance(layer, KVQLayer)]
    assert min(stored) >= 3 * 64, "at least three flushes"
    coarser = KVQ(**{**QUANTIZED, "nbits_k": 2, "nbits_v": 2}, model=model)
    assert compare(forced(model, text, coarser), reference)[0] > BOUND, "the bound tells 8 bits from 2"


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
        window = replace(side.window, buffer=side.window.buffer.roll(1, dims=2))
        side.contents = replace(side.contents, window=window)
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
def test_left_padding_while_all_is_exact(model, padded, way, assert_telling):
    reference = model.generate(**padded, **GREEDY)
    assert_telling(new_tokens(reference, padded["input_ids"]))
    if way == "cache":
        output = model.generate(**padded, past_key_values=KVQ(**EXACT, model=model, padding=[41, 0]), **GREEDY)
    else:
        with attach(model, **EXACT) as attachment:
            output = model.generate(**padded, **GREEDY)
        assert attachment.cache.layers[0].padding == (41, 0)
    assert torch.equal(output, reference)


@pytest.mark.case(
    "two prompts of unequal length in one batch, quantized",
    "logits follow those of DynamicCache",
    report="lablup/mlxcel#75",
)
def test_left_padding_quantized(model, padded, forced, compare):
    mask = padded["attention_mask"]
    text = model.generate(**padded, **GREEDY)
    reference = forced(model, text, DynamicCache(config=model.config), mask=mask)
    cache = KVQ(**QUANTIZED, model=model, padding=[41, 0])
    difference, _ = compare(forced(model, text, cache, mask=mask), reference)
    assert difference <= BOUND
    first = cache.layers[0]
    assert [start + first.dropped_length for start in first.side("key").sinks.starts] == [41, 0]
    coarser = KVQ(**{**QUANTIZED, "nbits_k": 2, "nbits_v": 2}, model=model, padding=[41, 0])
    assert compare(forced(model, text, coarser, mask=mask), reference)[0] > BOUND


def test_a_second_turn_on_the_same_cache(model, prompts, assert_telling):
    ours, theirs = KVQ(**EXACT, model=model), DynamicCache(config=model.config)
    history = prompts
    for _ in range(3):
        reference = model.generate(history, past_key_values=theirs, **GREEDY)
        output = model.generate(history, past_key_values=ours, **GREEDY)
        assert torch.equal(output, reference)
        history = torch.cat([output, prompts[:, :9]], dim=1)
    assert_telling(new_tokens(reference, prompts))


def test_chunked_prefill(model, prompts, forced, compare):
    reference = model.generate(prompts, **GREEDY)
    cache = KVQ(**EXACT, model=model)
    assert torch.equal(model.generate(prompts, past_key_values=cache, prefill_chunk_size=70, **GREEDY), reference)
    whole, chunked = KVQ(**QUANTIZED, model=model), KVQ(**QUANTIZED, model=model)
    expected = forced(model, reference, DynamicCache(config=model.config), chunk=70)
    difference, _ = compare(forced(model, reference, chunked, chunk=70), expected)
    assert difference <= BOUND
    forced(model, reference, whole)
    assert chunked.get_seq_length() == whole.get_seq_length() == 324


@pytest.mark.parametrize("mode", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True, top_k=5)], ids=str)
@pytest.mark.case(
    "beam search, several sequences", "the tokens of DynamicCache", report="huggingface/transformers#48700"
)
def test_modes_that_change_the_batch(llama, prompts, mode, assert_telling):
    settings = {**GREEDY, **mode}
    torch.manual_seed(5)
    reference = llama.generate(prompts, **settings)
    assert_telling(new_tokens(reference, prompts))
    torch.manual_seed(5)
    assert torch.equal(llama.generate(prompts, past_key_values=KVQ(**EXACT), **settings), reference)


@pytest.mark.case(
    "generating with quanto at 4 and 2 bits in half precision",
    "works; keys and values keep their dtype",
    report="huggingface/transformers#34848",
)
def test_half_precision_states_keep_their_dtype(llama, prompts):
    model = llama.to(torch.bfloat16)
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
