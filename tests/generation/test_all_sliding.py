"""A model whose layers all slide: they are quantized, and those in full precision share a mask with them."""

import pytest
import torch
import transformers

from kvq import KVQ, attach
from kvq.errors import ModelError
from kvq.layers.quantized_layer import KVQLayer
from kvq.planning import plan

TOKENS, NEW = 100, 80
FIELDS = dict(backend="native", nbits_k=8, nbits_v=8, residual_length=32)


@pytest.fixture(scope="module")
def mistral():
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=40, initializer_range=0.2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


def generate(model, **options):
    prompt = torch.randint(1, 99, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    asked = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    return model.generate(prompt, **asked, **options)[:, TOKENS:]


@pytest.mark.parametrize("place", ["0", "1", "last:1"])
def test_a_layer_of_it_may_stay_in_full_precision(mistral, place):
    expected = generate(mistral)
    assert len(expected.unique()) > 8
    fields = {**FIELDS, "layers": {place: {"full_precision": True}}}
    cache = KVQ(**fields, model=mistral)
    assert (generate(mistral, past_key_values=cache) == expected).float().mean() > 0.95
    assert sum(isinstance(layer, KVQLayer) for layer in cache.layers) == 2
    assert {layer.get_seq_length() for layer in cache.layers} == {TOKENS + NEW - 1}
    with attach(mistral, **fields):
        assert (generate(mistral) == expected).float().mean() > 0.95


def test_its_plan_counts_what_is_held(mistral):
    fields = {**FIELDS, "layers": {"last:1": {"full_precision": True}}}
    cache = KVQ(**fields, model=mistral)
    states = torch.randn(1, 2, 200, 16)
    for layer in range(3):
        cache.update(states, states, layer)
    planned = plan(mistral.config, config=fields, context=200, dtype=torch.float32)
    assert planned.total_bytes == cache.memory().total_bytes


def test_all_of_them_are_too_many(mistral):
    with pytest.raises(ModelError, match="nothing in this model would be quantized"):
        KVQ(**FIELDS, layers={"0-2": {"full_precision": True}}, model=mistral)
