"""Files of caches that hold more than keys and values, and of both attentions of an encoder-decoder model."""

import json

import pytest
import torch
import transformers
from carrying_models import LINEAR, SMALL, falcon_h1, glm_5
from safetensors import safe_open
from transformers.cache_utils import DynamicLayer

from kvq import KVQ, EncoderDecoderKVQ
from kvq.errors import CacheFileError, CacheStateError
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import carrier_of
from kvq.persistence.header import CacheHeader

QUANTIZED = dict(nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32)


def qwen3_next():
    types = ["linear_attention", "full_attention"]
    return transformers.Qwen3NextConfig(num_key_value_heads=2, head_dim=32, layer_types=types, **LINEAR, **SMALL)


def zaya():
    return transformers.ZayaConfig(
        head_dim=32, num_key_value_heads=2, sliding_window=24, layer_types=["hybrid_sliding", "hybrid"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=32, **SMALL,
    )  # fmt: skip


def qwen4_exp():
    return transformers.Qwen4ExpTextConfig(
        head_dim=32, num_key_value_heads=2, layer_types=["linear_attention", "full_attention"], indexer_n_heads=2,
        indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=16, indexer_compress_ratio=4, **LINEAR, **SMALL,
    )  # fmt: skip


def gemma4():
    return transformers.Gemma4TextConfig(
        head_dim=32, global_head_dim=32, num_key_value_heads=2, sliding_window=24, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=99, **{**SMALL, "num_hidden_layers": 4},
    )  # fmt: skip


KINDS = {
    "Qwen3NextConfig": qwen3_next, "FalconH1Config": falcon_h1, "GlmMoeDsaConfig": glm_5, "ZayaConfig": zaya,
    "Qwen4ExpTextConfig": qwen4_exp, "Gemma4TextConfig": gemma4,
}  # fmt: skip


@pytest.fixture(params=[name for name in KINDS if hasattr(transformers, name)])
def model(request):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[request.param](), dtype=torch.float32).eval()
    skip_unless_it_runs(model)
    return model


def skip_unless_it_runs(model):
    try:
        read(model, None, ids(3))
    except RuntimeError as error:  # Qwen4-Exp of 5.17 with the torch of its time
        pytest.skip(f"the model does not run by itself: {error}")


def ids(tokens, seed=1):
    return torch.randint(3, 99, (2, tokens), generator=torch.Generator().manual_seed(seed))


def read(model, cache, text):
    with torch.no_grad():
        return model(text, past_key_values=cache, use_cache=True).logits


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["cache"]), file.metadata()["format_version"]


@pytest.mark.parametrize("options", [{}, {"layers": {"1": {"full_precision": True}}}], ids=["quantized", "kept"])
def test_a_loaded_cache_goes_on_as_the_saved_one(model, options, tmp_path):
    path = tmp_path / "cache.safetensors"
    if options and sum(isinstance(layer, KVQLayer) for layer in KVQ(model=model).layers) < 2:
        options = {}
    cache = KVQ(QUANTIZED, model=model, **options)
    read(model, cache, ids(150))
    cache.save(path)
    loaded = KVQ.load(path, model=model)
    expected = torch.cat([read(model, cache, piece) for piece in ids(9, 2).split([1, 8], dim=1)], dim=1)
    found = torch.cat([read(model, loaded, piece) for piece in ids(9, 2).split([1, 8], dim=1)], dim=1)
    assert torch.equal(found, expected)
    assert loaded.memory().total_bytes <= cache.memory().total_bytes


def test_such_a_file_has_a_version_of_its_own(model, tmp_path):
    cache = KVQ(QUANTIZED, model=model)
    read(model, cache, ids(50))
    cache.save(tmp_path / "cache.safetensors")
    if any(not isinstance(layer, KVQLayer | DynamicLayer) or carrier_of(layer) is not layer for layer in cache.layers):
        assert (
            header_of(tmp_path / "cache.safetensors")[1] == "4"
        )  # else before 5.20, where shared layers have no class
    llama = KVQ(QUANTIZED)
    llama.update(torch.randn(1, 2, 50, 32), torch.randn(1, 2, 50, 32), 0)
    llama.save(tmp_path / "plain.safetensors")
    header, version = header_of(tmp_path / "plain.safetensors")
    assert version == "1", "what older releases read has not changed"
    assert "carried" not in header["layers"][0]
    assert "cross_layers" not in header


def test_states_of_convolutions_that_record_are_saved_as_those_that_go_on(tmp_path):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(qwen3_next(), dtype=torch.float32).eval()
    cache, plain = KVQ(QUANTIZED, model=model), KVQ(QUANTIZED, model=model)
    cache.activate_past_recording()
    for one in (cache, plain):
        read(model, one, ids(50))
        one.save(tmp_path / f"{one is cache}.safetensors")
    one, other = (KVQ.load(tmp_path / f"{name}.safetensors", model=model) for name in (True, False))
    assert torch.equal(one.layers[0].conv_states[0], other.layers[0].conv_states[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda carried: carried["previous"].append(True), "states are described, 1 are expected"),
        (lambda carried: carried["kernel_sizes"].__setitem__(0, 3), "its kernel has a size of 3"),
        (lambda carried: carried["recurrent"][0]["shape"].__setitem__(0, 7), "rows"),
        (lambda carried: carried["recurrent"].__setitem__(0, None), "are too many"),
        (lambda carried: carried.update(kind="indexed"), "header is wrong"),
    ],
)
def test_a_header_that_describes_no_such_layer_is_refused(change, message, tmp_path, monkeypatch):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(qwen3_next(), dtype=torch.float32).eval()
    cache, path = KVQ(QUANTIZED, model=model), tmp_path / "cache.safetensors"
    read(model, cache, ids(50))
    plain = CacheHeader.model_dump_json

    def changed(header):
        content = json.loads(plain(header))
        change(content["layers"][0]["carried"])
        return json.dumps(content)

    monkeypatch.setattr(CacheHeader, "model_dump_json", changed)
    cache.save(path)
    with pytest.raises(CacheFileError, match=message):
        KVQ.load(path, model=model)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=32, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=99,
        decoder_start_token_id=0, initializer_factor=5.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("cross", ["keep", "quantize"])
def test_both_attentions_of_an_encoder_decoder_model(cross, tmp_path):
    model, path = t5(), tmp_path / "cache.safetensors"
    cache = EncoderDecoderKVQ(QUANTIZED, model=model, cross_attention=cross)
    encoded = model.get_encoder()(ids(70))

    def step(one, text, states):
        return model(encoder_outputs=(states,), decoder_input_ids=text, past_key_values=one).logits

    with torch.no_grad():
        step(cache, ids(90), encoded[0])
        cache.save(path)
        loaded = EncoderDecoderKVQ.load(path, model=model)
        assert header_of(path)[1] == "4"
        assert isinstance(loaded.cross_attention_cache, KVQ) == (cross == "quantize")
        # Without the encoder's states: none but those in the file are read.
        found = step(loaded, ids(10, 5), torch.zeros_like(encoded[0]))
        assert torch.equal(found, step(cache, ids(10, 5), encoded[0]))
    loaded.move_to("cpu")
    assert loaded.get_seq_length() == 100
    with pytest.raises(CacheFileError, match=r"load it by EncoderDecoderKVQ\.load"):
        KVQ.load(path)


def test_a_file_of_one_attention_is_refused_for_two(tmp_path):
    cache = KVQ(QUANTIZED, layers={})
    for layer in range(2):
        cache.update(torch.randn(2, 2, 90, 32), torch.randn(2, 2, 90, 32), layer)
    cache.save(tmp_path / "cache.safetensors")
    with pytest.warns(UserWarning, match="which model"), pytest.raises(CacheFileError, match=r"load it by KVQ\.load"):
        EncoderDecoderKVQ.load(tmp_path / "cache.safetensors", model=t5())


def test_two_attentions_that_have_evicted_tokens_are_not_saved(tmp_path):
    model = t5()
    cache = EncoderDecoderKVQ(QUANTIZED, model=model)
    with torch.no_grad():
        model(input_ids=ids(70), decoder_input_ids=ids(90), past_key_values=cache)
    cache.self_attention_cache.evict(1, torch.arange(90) != 50)
    with pytest.raises(CacheStateError, match=r"evicted from layers \[1\]"):
        cache.save(tmp_path / "cache.safetensors")


def test_both_attentions_move():
    model = t5()
    cache = EncoderDecoderKVQ(QUANTIZED, model=model)
    with torch.no_grad():
        model(input_ids=ids(70), decoder_input_ids=ids(90), past_key_values=cache)
    before = [layer.keys.clone() for layer in (*cache.layers, *cache.cross_attention_cache.layers)]
    held = [*cache.layers, *cache.cross_attention_cache.layers]
    cache.move_to(torch.device("cpu"))
    after = [*cache.layers, *cache.cross_attention_cache.layers]
    assert not {id(one) for one in held} & {id(one) for one in after}
    for layer, keys in zip(after, before, strict=True):
        assert torch.equal(layer.keys, keys)
