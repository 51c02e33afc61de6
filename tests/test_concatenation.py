"""Caches of texts that were read apart, put behind each other."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
)

from kvq import KVQ
from kvq.cache.key_rotation import KeyRotation
from kvq.errors import CacheStateError, ModelError, StatesError

EXACT = {"backend": "native", "residual_length": 4096}
SMALL = {"backend": "native", "residual_length": 16, "sink_length": 2}
SHAPE = dict(
    vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.2,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}  # fmt: skip
TURNED = {
    "default": lambda: LlamaConfig(**SHAPE),
    "linear": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
    ),
    "llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN),
    "norms of keys": lambda: Qwen3Config(**SHAPE),
    "a part of each head": lambda: GPTNeoXConfig(
        vocab_size=200, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1024,
    ),
}  # fmt: skip


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def draw(count: int, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 200, (rows, count), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, **fields) -> KVQ:
    cache = KVQ(model=model, **fields)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def model():
    return build(LlamaConfig(**SHAPE))


@pytest.mark.parametrize("make", TURNED.values(), ids=TURNED)
def test_keys_are_those_that_the_model_computes_at_the_new_positions(make):
    model = build(make())
    first, second = draw(70, 1), draw(90, 2)
    merged = KVQ.concatenate([read(model, first, **EXACT), read(model, second, **EXACT)], model=model)
    moved = DynamicCache(config=model.config)
    with torch.no_grad():
        model(second, past_key_values=moved, position_ids=torch.arange(70, 160)[None])
    for index, layer in enumerate(moved.layers):
        keys, values = merged.materialize(index)
        torch.testing.assert_close(keys[:, :, 70:], layer.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values[:, :, 70:], layer.values, rtol=1e-4, atol=1e-4)
        assert (keys[:, :, 70:] - read(model, second, **EXACT).materialize(index)[0]).abs().max() > 0.1
    assert merged.get_seq_length() == 160


def test_a_model_goes_on_as_with_texts_that_do_not_see_each_other(model):
    """The reference is one forward over both texts with a mask that hides the first from the second."""
    first, second, last = draw(40, 1), draw(50, 2), draw(20, 3)
    mask = torch.ones(110, 110, dtype=torch.bool).tril()
    mask[40:90, :40] = False
    with torch.no_grad():
        expected = model(torch.cat([first, second, last], dim=1), attention_mask=mask[None, None]).logits[:, 90:]
        merged = KVQ.concatenate([read(model, one, **EXACT) for one in (first, second)], model=model)
        found = model(last, past_key_values=merged).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_first_text_stays_bit_for_bit_and_the_others_are_quantized(model):
    caches = [read(model, draw(200, seed, rows=2), **SMALL) for seed in range(3)]
    before = [cache.materialize(1) for cache in caches]
    merged = KVQ.concatenate(caches, model=model)
    assert (merged.get_seq_length(), merged.layers[1].side("key").store.length) == (600, 576)
    for found, own in zip(merged.materialize(1), before[0], strict=True):
        assert torch.equal(found[:, :, :128], own[:, :, :128])
    for cache, own in zip(caches, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(cache.materialize(1), own, strict=True))
    values = merged.materialize(1)[1][:, :, 200:400]
    assert 0 < (values - before[1][1]).norm() < 0.8 * before[1][1].norm()


def test_known_tokens_are_joined(model):
    caches = [read(model, draw(count, count), **SMALL) for count in (30, 40)]
    assert KVQ.concatenate(caches, model=model).token_ids is None
    for cache, count in zip(caches, (30, 40), strict=True):
        cache.token_ids = torch.cat([draw(count, count), torch.tensor([[7]])], dim=1)
    merged = KVQ.concatenate(caches, model=model)
    assert torch.equal(merged.token_ids, torch.cat([draw(30, 30), draw(40, 40)], dim=1))
    prompt = torch.cat([merged.token_ids, draw(5, 9)], dim=1)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=merged, max_new_tokens=4, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert output.shape[1] == 79


def test_layers_in_full_precision_are_joined_too(model):
    fields = {**SMALL, "layers": {"0": {"full_precision": True}}}
    merged = KVQ.concatenate([read(model, draw(90, seed), **fields) for seed in (1, 2)], model=model)
    assert [layer.get_seq_length() for layer in merged.layers] == [180, 180]
    assert type(merged.layers[0]).__name__ == "DynamicLayer"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=200), "no rotary embeddings"),
        (
            lambda: LlamaConfig(
                **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            ),
            "kind 'dynamic'",
        ),
        (lambda: Gemma3TextConfig(**SHAPE, sliding_window=64), "kind"),
    ],
    ids=["learned positions", "dynamic", "two kinds in one model"],
)
def test_models_whose_keys_turn_otherwise_are_refused(make, said):
    with pytest.raises(ModelError, match=said):
        KeyRotation(build(make()))


def test_a_configuration_is_no_model(model):
    with pytest.raises(ModelError, match=r"model=LlamaConfig: .* give it, with its weights"):
        KeyRotation(model.config)


def test_models_whose_positions_images_shift_are_refused():
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    text = dict(**shape, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    with pytest.raises(ModelError, match="images shift the positions"):
        KeyRotation(model)


def test_a_model_that_does_not_keep_what_it_says_is_found_out(model, monkeypatch):
    """As if keys were turned twice as fast as by the embedding that was found."""
    kind, calls = type(model.model.rotary_emb), iter((2, 2, 1, 1))
    forward = kind.forward

    def hasty(self, states, position_ids):
        return forward(self, states, position_ids * next(calls))

    monkeypatch.setattr(kind, "forward", hasty)
    with pytest.raises(ModelError, match=r"keys of layer 0 that were turned .* differ by \d+"):
        KeyRotation(model)


def test_caches_that_do_not_fit_are_refused(model):
    one = read(model, draw(30, 1), **SMALL)
    evicted, padded = read(model, draw(90, 1), **SMALL), KVQ(model=model, padding=(3,), **SMALL)
    evicted.evict(0, torch.arange(20, 90))
    evicted_behind = read(model, draw(90, 1), **SMALL)
    evicted_behind.evict(1, torch.arange(20, 90))
    with torch.no_grad():
        model(draw(30, 2), past_key_values=padded)
    cut_short = one.fork()
    cut_short.update(*torch.zeros(2, 1, 2, 5, cut_short.materialize(0)[0].shape[-1]), 0)
    for caches, error, said in (
        ([], StatesError, "there are no caches"),
        ([one, KVQ(model=model, **SMALL)], CacheStateError, "cache 1 holds no tokens"),
        ([one, evicted], CacheStateError, "cache 1 has evicted tokens"),
        ([one, evicted_behind], CacheStateError, "cache 1 has evicted tokens"),
        ([padded, one], CacheStateError, "cache 0 has left padding"),
        ([one, cut_short], CacheStateError, "cache 1 has layers of 30 and 35 tokens; a forward was cut short"),
        ([one, read(model, draw(30, 1, rows=2), **SMALL)], StatesError, "2 layers and 1 rows, 2 layers and 2 rows"),
    ):
        with pytest.raises(error, match=said):
            KVQ.concatenate(caches, model=model)
