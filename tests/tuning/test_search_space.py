"""What may be chosen: which settings the options span, and which pairs a configuration can say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvq import KVQCacheConfig
from kvq.tuning import Grid, Pair, SearchSpace, SideSetting, widen_for_biases
from kvq.tuning.side_setting import build_config
from kvq.tuning.tuner import _list_biased_keys

BYTES, PLAIN = SideSetting("native", 2, metadata="int8"), SideSetting("native", 2)


def metadata_of(config, count):
    return [config.for_layer(index).key.metadata_dtype for index in range(count)]


def test_both_sides_of_a_layer_have_one_dtype_of_metadata():
    space = SearchSpace((BYTES, PLAIN), (BYTES, PLAIN), ((0,),))
    assert space.pairs == [Pair(BYTES, BYTES), Pair(PLAIN, PLAIN)]
    assert Pair(BYTES, None).is_possible


@pytest.mark.parametrize("plain", [{0}, {2}, {0, 1, 3}, {0, 1, 2, 3}, set()])
def test_layers_may_differ_in_metadata(plain):
    pairs = {index: Pair(PLAIN, PLAIN) if index in plain else Pair(BYTES, BYTES) for index in range(4)}
    config = build_config(KVQCacheConfig(backend="native", metadata_dtype="float16"), pairs, 4)
    assert metadata_of(config, 4) == [None if index in plain else torch.int8 for index in range(4)]


def test_a_grid_has_the_clipping_of_each_width_for_the_default_backend_alone():
    found = Grid(backends=("native", "hqq"), bits=(1, 2)).settings()
    assert [(one.backend, one.nbits, one.clip) for one in found] == [
        ("native", 1, "auto"),
        ("native", 2, "auto"),
        ("native", 2, 0.75),
        ("native", 2, 0.95),
        ("hqq", 1, "auto"),
        ("hqq", 2, "auto"),
    ]
    given = Grid(bits=(2, 8), clips=("none", 0.9), metadata=("default", "int8")).settings()
    assert [(one.nbits, one.clip, one.metadata) for one in given] == [
        (bits, clip, metadata) for bits in (2, 8) for metadata in ("default", "int8") for clip in ("none", 0.9)
    ]


def tiny_qwen2(bias):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, vocab_size=50, **shape)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(bias * torch.randn(16))
    return model


@pytest.mark.parametrize(("bias", "found"), [(50.0, ("int8", "default")), (0.0, ("int8",))])
def test_keys_with_a_large_bias_are_also_tried_without_bytes(bias, found):
    model = tiny_qwen2(bias)
    assert widen_for_biases(Grid(), model).metadata == found
    assert widen_for_biases(Grid(metadata=("float16",)), model).metadata == ("float16",)


@pytest.mark.parametrize(("setting", "bias", "warns"), [(BYTES, 50.0, True), (PLAIN, 50.0, False), (BYTES, 0.0, False)])
def test_an_answer_with_biased_keys_in_bytes_comes_with_a_warning(setting, bias, warns):
    config = build_config(KVQCacheConfig(backend="native"), dict.fromkeys((0, 1), Pair(setting, setting)), 2)
    plan = SimpleNamespace(model=tiny_qwen2(bias), space=SearchSpace((setting,), (setting,), ((0,), (1,))))
    assert [("write metadata_dtype: float16" in one) for one in _list_biased_keys(plan, config)] == [True] * warns
