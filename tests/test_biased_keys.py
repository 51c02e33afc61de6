"""Keys with a large bias: found in the modules of each family, by what the model itself hands to its cache."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig, attach
from kvq.layers.biased_keys import KeyBias, explain_biased_keys, find_biased_keys
from kvq.planning import plan
from kvq.registry import get_registry

SMALL = dict(vocab_size=99, initializer_range=0.2, pad_token_id=0)
DECODER = dict(
    hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SMALL
)
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, DECODER, "k_proj"),
    "llama": (transformers.LlamaConfig, {**DECODER, "attention_bias": True}, "k_proj"),
    "opt": (
        transformers.OPTConfig,
        dict(hidden_size=64, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, init_std=0.2),
        "k_proj",
    ),
    "gpt 2": (transformers.GPT2Config, dict(n_embd=64, n_layer=2, n_head=4, **SMALL), "c_attn"),
    "gpt neox": (
        transformers.GPTNeoXConfig,
        dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **SMALL),
        "query_key_value",
    ),
    "bloom": (transformers.BloomConfig, dict(hidden_size=64, n_layer=2, n_head=4, **SMALL), "query_key_value"),
    "falcon": (
        transformers.FalconConfig,
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True, new_decoder_architecture=True)
        | dict(num_kv_heads=2, **SMALL),
        "query_key_value",
    ),
    "falcon, one key": (
        transformers.FalconConfig,
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True, multi_query=True, **SMALL),
        "query_key_value",
    ),
}


def build(family):
    kind, fields, name = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**fields), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
    projection = next(module for path, module in model.named_modules() if path.endswith(f"1.{inner(path)}{name}"))
    return model, projection


def inner(path):
    """Return the module between a numbered layer and its projections, e.g. `self_attn.`."""
    return path.split(".1.")[-1].rpartition(".")[0] + "." if ".1." in path else ""


@torch.no_grad()
def keys_of(model):
    cache = DynamicCache(config=model.config)
    model(torch.arange(2, 34)[None], past_key_values=cache)
    return cache.layers[1].keys


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_counts_where_the_keys_of_the_model_say_so(family):
    model, projection = build(family)
    assert find_biased_keys(model) == ()
    clean = keys_of(model)
    heads = projection.bias.numel() // 16
    hits = []
    for row in range(0, heads * 16, 16):
        with torch.no_grad():
            projection.bias[row + 3] = 1000.0
        is_key = bool((keys_of(model) - clean).abs().max() > 100)
        found = find_biased_keys(model)
        assert (len(found) == 1) is is_key, row
        if is_key:
            assert found[0].layer_idx == 1
            assert model.get_submodule(found[0].path) is projection
            hits.append(found[0].growth)
        with torch.no_grad():
            projection.bias.zero_()
    assert len(hits) == len({head.numpy().tobytes() for head in clean[0]}), "some models repeat a head in the cache"


def test_the_growth_is_that_of_the_range_of_a_token():
    model, projection = build("qwen2")
    with torch.no_grad():
        projection.bias[5] = 40.0
        for norm in (model.model.layers[1].input_layernorm, model.model.layers[0].input_layernorm):
            norm.weight.fill_(0.5)
    (found,) = find_biased_keys(model)
    biased = keys_of(model)[0, 0]
    with torch.no_grad():
        projection.bias.zero_()
    clean = keys_of(model)[0, 0]
    ranges = [(keys.amax(-1) - keys.amin(-1)).mean() for keys in (biased, clean)]
    # Half of the range is what the bias widens, where the rotary embedding turns it to one side.
    assert 0.4 * found.growth <= ranges[0] / ranges[1] <= 1.6 * found.growth
    assert find_biased_keys(model) == ()


@pytest.mark.case(
    "Qwen2: a key bias that is large against the spread, keys quantized per token",
    "told by `kvq.layers.biased_keys` with the layers; per channel the error is that of unbiased keys",
    report="ggml-org/llama.cpp#21385",
)
def test_what_it_costs_and_what_is_told():
    model, projection = build("qwen2")
    with torch.no_grad():
        projection.bias[[6, 7, 22, 23]] = torch.tensor([60.0, -60.0, 50.0, -50.0])  # the position hardly turns these
    errors = {}
    keys = keys_of(model).repeat(1, 1, 8, 1)
    for axis in ("per_token", "per_channel"):
        cache = KVQ(axis_key=axis, q_group_size=16, residual_length=0, sink_length=0)
        cache.update(keys, keys, 0)
        errors[axis] = float((cache.materialize(0)[0] - keys).abs().mean())
    assert errors["per_token"] > 3 * errors["per_channel"]
    biases = find_biased_keys(model)
    text = explain_biased_keys(biases, settings(axis_key="per_token"))
    assert text.startswith("the keys of layers 1 have a bias (model.layers.1.self_attn.k_proj.bias)")
    assert "write axis_key: per_channel" in text
    assert explain_biased_keys(biases, settings()) is None


def settings(**fields):
    config = KVQCacheConfig(**fields)
    return {index: config.for_layer(index, 2) for index in range(2)}


def test_many_bits_and_layers_that_are_kept_are_not_hurt():
    biases = [KeyBias(0, "layers.0.k_proj", 3.0), KeyBias(1, "layers.1.k_proj", 500.0)]
    text = explain_biased_keys(biases, settings(axis_key="per_token", nbits_k=8))
    assert "layers 1 have" in text
    assert "500 times wider" in text
    assert explain_biased_keys(biases[:1], settings(axis_key="per_token", nbits_k=8)) is None
    kept = settings(axis_key="per_token", layers={"last:1": {"full_precision": True}})
    assert "layers 0 have" in explain_biased_keys(biases, kept)
    several = [KeyBias(index, f"layers.{index}.k_proj", None) for index in range(12)]
    one = KVQCacheConfig(axis_key="per_token").for_layer(0)
    text = explain_biased_keys(several, dict.fromkeys(range(12), one))
    assert "layers 0, 1, 2, 3, 4, 5, 6, 7 and 4 more have" in text
    assert "by how much only the weights tell" in text


@pytest.mark.parametrize(("bits", "growth", "is_told"), [(4, 30.0, True), (2, 3.0, False)])
def test_middles_in_bytes_are_too_coarse_for_a_large_bias(bits, growth, is_told):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 1024, 64, generator=generator)
    keys += 3 * (growth - 1) * torch.randn(64, generator=generator).sign()
    errors = {}
    for dtype in ("float16", "int8"):
        cache = KVQ(backend="native", nbits_k=bits, nbits_v=2, metadata_dtype=dtype, residual_length=0, sink_length=0)
        cache.update(keys, keys, 0)
        errors[dtype] = float((cache.materialize(0)[0] - keys).square().mean())
    assert (errors["int8"] > 1.2 * errors["float16"]) == is_told
    text = text_of(growth, nbits_k=bits, nbits_v=2, metadata_dtype="int8")
    assert (text is not None) == is_told


def test_it_is_told_where_middles_are_bytes_and_the_bias_is_known():
    in_bytes = dict(nbits_v=2, metadata_dtype="int8")
    text = text_of(30.0, nbits_k=4, **in_bytes)
    assert text.startswith("the keys of layers 0 have a bias (layers.0.k_proj.bias), too large for middles")
    assert text_of(30.0, nbits_k=4, nbits_v=2) is None
    assert text_of(30.0, nbits_k=8, **in_bytes) is None, "eight bits have no middles in bytes"
    assert text_of(None, nbits_k=4, **in_bytes) is None
    own = replace(get_registry().get_backend("native"), uses_group_size=False)
    assert text_of(30.0, nbits_k=4, backend=own, **in_bytes) is None, "a representation of its own has no middles"


def text_of(growth, **fields):
    return explain_biased_keys([KeyBias(0, "layers.0.k_proj", growth)], settings(**fields))


def test_weights_that_are_packed_leave_the_size_unknown():
    model, projection = build("qwen2")
    with torch.no_grad():
        projection.bias.fill_(1.0)
    projection.weight = torch.nn.Parameter(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    assert [bias.growth for bias in find_biased_keys(model)] == [None]


@pytest.mark.parametrize(
    ("config", "fields", "warns"),
    [
        (transformers.Qwen2Config(**DECODER), {}, False),
        (transformers.Qwen2Config(**DECODER), {"axis_key": "per_token"}, True),
        (transformers.LlamaConfig(**DECODER, attention_bias=True), {"axis_key": "per_token"}, True),
        (transformers.LlamaConfig(**DECODER), {"axis_key": "per_token"}, False),
        (transformers.Qwen2Config(**DECODER), {"layers": {"0": {"axis_key": "per_token"}}}, True),
    ],
)
@pytest.mark.case(
    "`kvq plan` of a model whose keys have a bias, with per-token keys",
    "a warning that names the layers and the module; no weights are read",
    report="vllm-project/vllm#10411",
)
def test_a_plan_warns(config, fields, warns):
    made = plan(config, {"q_group_size": 16, "residual_length": 32, **fields}, context=700)
    assert [("k_proj.bias" in text) for text in made.warnings] == [True] * warns
    assert ("warning: the keys of layers" in str(made)) is warns
    if "layers" in fields:
        assert "layers 0 have" in made.warnings[0]


@pytest.mark.case("keys with a large bias (Qwen2), per token, under attach", "one warning before anything runs")
def test_attach_warns_before_anything_runs():
    model, projection = build("qwen2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, axis_key="per_token").detach()
        assert not caught, "a bias of zero is none"
        with torch.no_grad():
            projection.bias[3] = 50.0
        attach(model, axis_key="per_channel").detach()
        assert not caught, "groups inside one channel take the bias up"
        attach(model, axis_key="per_token").detach()
    assert len(caught) == 1
    assert "k_proj.bias" in str(caught[0].message)
    assert "axis_key: per_channel" in str(caught[0].message)
