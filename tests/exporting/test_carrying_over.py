"""The nearest setting, what is lost, and the cache that rounds as an engine does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from kvq import KVQCacheConfig
from kvq.cli.sample_block import measure_effective_bits
from kvq.errors import EvaluationError
from kvq.exporting import ENGINES, CarriedOver, EmulatedCache, carry_over, find_engine


def _carry(to: str, model_config: LlamaConfig | None = None, **fields) -> CarriedOver:
    config = KVQCacheConfig(backend="native", **fields)
    return carry_over(config, find_engine(to), measure_effective_bits, model_config)


@pytest.mark.parametrize(
    ("to", "bits", "arguments"),
    [
        ("llama.cpp", (8, 4), "llama-server -m MODEL.gguf -fa on -ctk q8_0 -ctv q4_0"),
        ("llama.cpp", (4, 2), "llama-server -m MODEL.gguf -fa on -ctk q4_0 -ctv q4_0"),
        ("llama.cpp", (5, 5), "llama-server -m MODEL.gguf -fa on -ctk q5_1 -ctv q5_1"),
        ("vllm", (8, 8), "vllm serve MODEL --kv-cache-dtype int8_per_token_head"),
        ("vllm", (4, 4), "vllm serve MODEL --kv-cache-dtype int4_per_token_head"),
        ("sglang", (4, 4), "python -m sglang.launch_server --model-path MODEL --kv-cache-dtype fp4_e2m1"),
        ("tensorrt-llm", (4, 2), "trtllm-serve MODEL --extra_llm_api_options kv.yaml"),
        ("mlx", (4, 4), "mlx_lm.generate --model MODEL --kv-bits 4 --kv-group-size 64 --quantized-kv-start 0"),
        ("mlx", (2, 2), "mlx_lm.generate --model MODEL --kv-bits 2 --kv-group-size 64 --quantized-kv-start 0"),
    ],
)
def test_the_bits_choose_the_setting(to, bits, arguments):
    carried = _carry(to, nbits_k=bits[0], nbits_v=bits[1])
    assert " ".join(carried.list_arguments()) == arguments


def test_what_is_lost_is_said_line_by_line():
    carried = _carry("vllm", nbits_k=4, nbits_v=2, rotation_k="hadamard", rotation_v="hadamard", residual_length=64)
    lost = "\n".join(carried.losses)
    assert "keys: groups of 64 tokens of a channel become one head of one token" in lost
    assert "values: 2.56 bits an element become 4.25" in lost
    assert "keys and values apart (4 and 2 bits): one format for both" in lost
    assert "the window: the newest 64 tokens" in lost
    assert "the sinks: the first 4 tokens" in lost
    assert "keys: the balance (auto)" in lost
    assert "the rotation" not in lost  # int4_per_token_head has one of its own
    assert "the rounding" not in lost
    assert "keys: the rotation (hadamard)" in "\n".join(_carry("sglang", rotation_k="hadamard").losses)
    with pytest.warns(UserWarning, match="has no effect"):
        chosen = _carry("vllm", rounding_k="error_feedback", calibration="standard")
    assert [line for line in chosen.losses if "the rounding" in line] == ["keys: the rounding (error_feedback)"]
    bare = _carry(
        "llama.cpp",
        nbits_k=8,
        nbits_v=8,
        balance_k="none",
        balance_v="none",
        clip_k="none",
        clip_v="none",
        rotation_k="none",
        rotation_v="none",
        residual_length=0,
        sink_length=0,
    )
    assert [line.split(":")[0] for line in bare.losses] == ["keys", "keys", "values", "values"]


def test_layers_in_full_precision_are_skipped_where_the_engine_can():
    layers = {"0-1": {"full_precision": True}, "3": {"nbits_k": 8}}
    assert _carry("vllm", nbits_k=8, nbits_v=8, layers=layers).list_arguments()[-3:] == (
        "--kv-cache-dtype-skip-layers",
        "0",
        "1",
    )
    other = _carry("llama.cpp", layers=layers)
    assert other.skipped == ()
    assert "layers in full precision: they are quantized like the others" in other.losses
    assert "settings of single layers: 1 entries become one setting for all" in other.losses


def test_first_layers_in_full_precision_are_not_all_layers_where_no_model_says():
    carried = _carry("vllm", nbits_k=8, nbits_v=8, layers={"0-1": {"full_precision": True}})
    assert carried.kept == (0, 1)
    assert carried.setting.label == _carry("vllm", nbits_k=8, nbits_v=8).setting.label


def test_layers_count_in_the_mean_with_a_model():
    small = LlamaConfig(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=4)
    carried = _carry("llama.cpp", small, nbits_k=4, nbits_v=4, layers={"last:2": {"nbits_k": 8}})
    key = (
        sum(
            measure_effective_bits(KVQCacheConfig(backend="native", nbits_k=bits).for_layer(0), "key", 64)
            for bits in (4, 8)
        )
        / 2
    )
    assert carried.wanted.key_bits == pytest.approx(key)
    assert carried.wanted.head_dim == 64


def test_what_cannot_be_carried_over_is_refused():
    with pytest.raises(EvaluationError, match="counts layers from the end; give --model"):
        _carry("vllm", layers={"last:2": {"nbits_k": 8}})
    with pytest.raises(EvaluationError, match="keeps every layer in full precision"):
        _carry("vllm", LlamaConfig(num_hidden_layers=1), layers={"0": {"full_precision": True}})
    with pytest.raises(EvaluationError, match="choose one of vllm, sglang, "):
        find_engine("ollama")
    odd = LlamaConfig(hidden_size=80, num_attention_heads=1, num_hidden_layers=1)
    with pytest.raises(EvaluationError, match="mlx has no setting for heads of 80 elements"):
        _carry("mlx", odd)
    latent = LlamaConfig()
    latent.kv_lora_rank = 64
    with pytest.raises(EvaluationError, match="latent"):
        _carry("mlx", latent)


@pytest.mark.parametrize("to", ENGINES)
def test_every_setting_is_emulated_token_by_token(to):
    """What is read of a token does not depend on how many came with it, but for a calibration's constants."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 24, 128, generator=generator).unbind(0)
    for setting in ENGINES[to].settings:
        at_once, in_steps = (EmulatedCache(None, setting) for _ in range(2))
        read = at_once.update(keys, values, 0)
        in_steps.update(keys, values, 0)
        for key, value in zip(keys.split(5, dim=2), values.split(5, dim=2), strict=True):
            stepped = in_steps.update(key, value, 0)
        assert torch.equal(stepped[0][:, :, 24:], read[0]), setting.label
        assert torch.equal(stepped[1][:, :, 24:], read[1]), setting.label
        assert 0 < (read[0] - keys).norm() / keys.norm() + (read[1] - values).norm() / values.norm() < 1


def test_kept_layers_are_exact():
    keys, values = torch.randn(2, 1, 2, 8, 64).unbind(0)
    cache, plain = EmulatedCache(None, ENGINES["vllm"].settings[0], kept=(1,)), DynamicCache()
    for index in range(2):
        cache.update(keys, values, index)
        plain.update(keys, values, index)
    assert torch.equal(cache.layers[1].keys, keys)
    assert not torch.equal(cache.layers[0].keys, keys)
