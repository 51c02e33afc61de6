"""Plans against caches: what a model without weights promises, a model with weights must hold."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ
from kvq.errors import BackendError, ConfigError, ModelError
from kvq.planning import plan, planner
from kvq.planning.planner import MAX_CONTEXT
from kvq.registry import register_backend
from kvq.store.affine import AffineCodec
from kvq.store.chunks import ChunkedStore
from kvq.store.window import TokenBuffer

TOKENS, ROWS = 700, 2
SMALL = dict(vocab_size=199, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SIZES = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, **SMALL)
DECODER = dict(intermediate_size=96, num_key_value_heads=1, **SIZES)
WIDE = dict(head_dim=48, **DECODER)
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)
SLIDING = dict(sliding_window=250, **WIDE)
LATENT = dict(kv_lora_rank=64, q_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32)
SHARED = {**SLIDING, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
BLOCKS = ["linear_attention", "full_attention"]

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**SLIDING),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(num_experts=4, **EXPERTS, **WIDE),
    "gemma 2": lambda: transformers.Gemma2Config(**SLIDING),
    "gemma 3": lambda: transformers.Gemma3TextConfig(**{**SLIDING, "num_hidden_layers": 6}),
    "gemma 3 with vision": lambda: transformers.Gemma3Config(
        text_config={**SLIDING, "num_hidden_layers": 6},
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
    ),
    "gemma 4": lambda: transformers.Gemma4TextConfig(
        layer_types=ALTERNATING, vocab_size_per_layer_input=199, global_head_dim=96, **SHARED
    ),
    "phi 3": lambda: transformers.Phi3Config(**DECODER),
    "gpt 2": lambda: transformers.GPT2Config(n_embd=96, n_layer=2, n_head=2, n_positions=1024, **SMALL),
    "gpt neox": lambda: transformers.GPTNeoXConfig(intermediate_size=96, **SIZES),
    "opt": lambda: transformers.OPTConfig(ffn_dim=96, word_embed_proj_dim=128, **SIZES),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(hidden_size=128, n_layer=2, n_head=2, **SMALL),
    "cohere 2": lambda: transformers.Cohere2Config(
        sliding_window=250, **{**DECODER, "num_hidden_layers": 4, "num_attention_heads": 4}
    ),
    "deepseek 3": lambda: transformers.DeepseekV3Config(
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **LATENT,
        **EXPERTS,
        **{**DECODER, "num_key_value_heads": 2},
    ),
    "gpt oss": lambda: transformers.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **SLIDING),
    "qwen3 next": lambda: transformers.Qwen3NextConfig(
        shared_expert_intermediate_size=32, num_experts=4, layer_types=BLOCKS, **EXPERTS, **WIDE
    ),
}
BITS = {"deepseek 3": dict(nbits_k=8, nbits_v=8)}


def build(family):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


@torch.inference_mode()
def prefill(model, cache, tokens=TOKENS, rows=ROWS):
    ids = torch.randint(2, 199, (rows, tokens), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def step(model, cache, rows=ROWS):
    model(input_ids=torch.full((rows, 1), 5), past_key_values=cache, use_cache=True)


def storage_bytes(cache):
    """Bytes of all tensors in the layers of transformers, found without kvq."""
    found = {}
    pending = [vars(layer) for layer in cache.layers]
    while pending:
        for thing in pending.pop().values():
            if isinstance(thing, torch.Tensor):
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            elif isinstance(thing, dict):
                pending.append(thing)
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_holds_what_the_model_then_holds(family):
    fields = BITS.get(family, {})
    model = build(family)
    made = plan(FAMILIES[family](), fields, context=TOKENS, batch=ROWS)
    measured = prefill(model, KVQ(fields, model=model)).memory()
    assert measured.packed_bytes > 0
    assert made.total_bytes == measured.total_bytes
    plain = prefill(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    assert made.full_precision_bytes == storage_bytes(plain)
    assert made.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.weights_bytes == 4 * made.num_parameters
    json.dumps(made.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma 2", "qwen3 next"])
def test_the_tokens_after_the_prompt_hold_what_is_planned(family):
    model = build(family)
    made = plan(FAMILIES[family](), context=TOKENS, batch=ROWS)
    cache = prefill(model, KVQ(model=model))
    plain = prefill(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    most = cache.memory().total_bytes
    for _ in range(made.horizon):
        step(model, cache)
        step(model, plain)
        most = max(most, cache.memory().total_bytes)
    assert made.later_bytes == cache.memory().total_bytes
    assert made.later_full_precision_bytes == storage_bytes(plain)
    assert most <= made.peak_bytes <= 1.2 * most


@pytest.mark.parametrize(
    "fields",
    [
        dict(nbits_k=8, nbits_v=4),
        dict(axis_key="per_token", q_group_size=24),
        dict(residual_length=0, sink_length=0),
        dict(residual_length=1000),
        dict(rotation_k="hadamard", q_group_size={"key": 128, "value": 32}),
        dict(backend="hqq", nbits_k=3),
        dict(metadata_dtype="float32"),
        dict(device="cpu"),
        dict(layers={"first:1": {"nbits_k": 8}}),
        dict(layers={"-1": {"full_precision": True}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 131, TOKENS])
def test_every_setting_is_counted(fields, tokens):
    model = build("llama")
    measured = prefill(model, KVQ(fields, model=model), tokens).memory()
    made = plan(model.config, fields, context=tokens, batch=ROWS)
    assert made.total_bytes == measured.total_bytes
    assert made.full_precision_bytes == measured.full_precision_bytes


def drop_metadata(monkeypatch):
    whole = AffineCodec.layout
    monkeypatch.setattr(
        AffineCodec, "layout", lambda self: {n: p for n, p in whole(self).items() if n.startswith("codes")}
    )


def forget_the_window(monkeypatch):
    monkeypatch.setattr(TokenBuffer, "held", lambda self: iter(()))


def halve_the_groups(monkeypatch):
    codec = AffineCodec.__init__

    def start(self, quantizer, spec, *args, **fields):
        codec(self, quantizer, replace(spec, group_length=spec.group_length // 2), *args, **fields)

    monkeypatch.setattr(AffineCodec, "__init__", start)


@pytest.mark.parametrize("break_it", [drop_metadata, forget_the_window, halve_the_groups])
def test_even_a_bound_of_two_percent_would_notice(monkeypatch, break_it):
    right = plan(FAMILIES["llama"](), context=8000, batch=ROWS).total_bytes
    break_it(monkeypatch)
    assert plan(FAMILIES["llama"](), context=8000, batch=ROWS).total_bytes != pytest.approx(right, rel=0.02)


def test_chunks_are_counted_only_when_there_are_other_ones(monkeypatch):
    counted = []
    held = ChunkedStore.held
    monkeypatch.setattr(ChunkedStore, "held", lambda self: counted.append(self) or held(self))
    made = plan(FAMILIES["llama"](), context=TOKENS)
    assert made.horizon == 64
    # A side is counted after the prompt, when its window grows, when it is flushed, and at the end.
    assert 2 * 3 <= len(counted) <= 2 * 5


def test_the_largest_context_is_the_largest():
    config = FAMILIES["llama"]()
    memory = plan(config, context=1).weights_bytes + 3_000_000
    largest = plan(config, context=1, gpu_memory=memory).largest_context
    assert plan(config, context=largest, gpu_memory=memory).fits
    assert not plan(config, context=largest + 1, gpu_memory=memory).fits


def test_what_fits_only_grows_with_the_context(monkeypatch):
    config = FAMILIES["gemma 2"]()
    outline = planner.outline_model(config, batch=1)  # which no context changes
    monkeypatch.setattr(planner, "outline_model", lambda *_: outline)
    contexts = [*range(1, 400, 13), *range(400, 1600, 67)]
    peaks = [plan(config, context=tokens).peak_bytes for tokens in contexts]
    assert peaks == sorted(peaks)


def test_memory_that_is_too_small_or_never_full():
    config = FAMILIES["llama"]()
    small = plan(config, context=9, gpu_memory=1000)
    assert (small.largest_context, small.fits, small.is_search_bounded) == (0, False, False)
    assert "the weights alone do not fit" in str(small)
    spacious = plan(config, context=9, gpu_memory=1 << 50)
    assert spacious.fits
    assert spacious.is_search_bounded
    assert "at least 4,194,304" in str(spacious)


def test_a_store_on_the_host_takes_no_memory_of_the_device():
    with_states, offloaded = (plan(FAMILIES["llama"](), {"device": d}, context=TOKENS) for d in (None, "cpu"))
    assert offloaded.total_bytes == with_states.total_bytes
    assert offloaded.peak_bytes < with_states.peak_bytes - sum(one.offloaded_bytes for one in offloaded.layers) / 2
    assert any("by device: cpu" in note for note in offloaded.notes)


def test_weights_may_be_told():
    made = plan(FAMILIES["llama"](), context=9, weights_bytes=12345)
    assert made.weights_bytes == 12345
    assert "12.1 KiB" in str(made)


def test_layers_say_why_and_equal_ones_share_a_row():
    rules = {"first:1": {"nbits_v": 4}, "5": {"full_precision": True}}
    config = transformers.Gemma2Config(**{**SLIDING, "num_hidden_layers": 8})
    made = plan(config, {"layers": rules, "sliding": "quantize"}, context=TOKENS)
    assert [layer.reason.partition(";")[0] for layer in made.layers[:2]] == ["layers['first:1']", "default"]
    assert "sliding window of 250 tokens, quantized since sliding: quantize" in made.layers[0].reason
    assert made.layers[5].reason == "layers['5']: full_precision"
    assert [row[0] for row in made.rows()] == ["0", "1, 3, 7", "2, 4, 6", "5"]
    # 4 + 32 / 64 bits of codes, scales and mids, a byte of a token's factor to 48 elements, an exponent to 64 * 48.
    assert made.rows()[0][2] == "quanto 4 bit per_channel by 64, hadamard, rms (4.67)"
    assert made.rows()[3][1] == "full precision"
    for row in made.rows():
        assert row[4] in " ".join(str(made).split()) or row[4].split()[0] in str(made)


@pytest.mark.parametrize(
    ("family", "layer", "words"),
    [
        ("mistral", 0, "quantized since the model has no other layers"),
        ("gemma 2", 0, "sliding window of 250 tokens, kept by transformers"),
        ("deepseek 3", 0, "keys are the latent, values the rope part"),
        ("qwen3 next", 0, "linear attention, a state of fixed size"),
        ("gemma 4", 5, "reads another layer's keys and values"),
    ],
)
def test_special_layers_say_why(family, layer, words):
    made = plan(FAMILIES[family](), BITS.get(family), context=TOKENS)
    assert words in made.layers[layer].reason


def test_what_is_unsupported_and_uncertain_is_said():
    hybrid = plan(FAMILIES["qwen3 next"](), context=TOKENS)
    assert hybrid.unsupported == ("the states of linear attention are not quantized (layers 0)",)
    long = plan(FAMILIES["gpt 2"](), context=2000)
    assert "the model was made for 1,024 tokens" in long.notes
    assert any("names no dtype" in note for note in long.notes)
    assert any("activations" in text for text in long.left_out)
    sliding = plan(FAMILIES["mistral"](), context=TOKENS)
    assert any("hold the whole prompt up to the next token" in note for note in sliding.notes)
    packed = FAMILIES["llama"]()
    packed.quantization_config = {"quant_method": "fp8"}
    assert any("weights are quantized" in note for note in plan(packed, context=9).notes)


TINY_GROUPS = dict(axis_key="per_token", axis_value="per_token", q_group_size=2, nbits_k=8)


@pytest.mark.parametrize(
    ("config", "fields", "error", "words"),
    [
        (transformers.T5Config(), {}, ModelError, "encoder-decoder"),
        (transformers.MambaConfig(hidden_size=64, num_hidden_layers=2), {}, ModelError, "nothing in this model"),
        (transformers.CLIPTextConfig(), {}, ModelError, "no model of transformers that generates text"),
        (FAMILIES["llama"](), dict(nbits_k=5), ConfigError, "nbits_k"),
        (FAMILIES["llama"](), dict(layers={"7": {"nbits_k": 8}}), ConfigError, "chooses no layer"),
        (FAMILIES["llama"](), TINY_GROUPS, ConfigError, "effective bits"),
        (FAMILIES["llama"](), dict(backend="qanto"), BackendError, "did you mean"),
    ],
)
def test_what_cannot_be_planned_is_refused(config, fields, error, words):
    with pytest.raises(error, match=words):
        plan(config, fields, context=TOKENS)


@pytest.mark.case(
    "a model whose configuration says float64, or `dtype=torch.float64`",
    "refused by `plan` with the dtypes that can be quantized and how to load it",
)
@pytest.mark.parametrize(("fields", "dtype"), [({"dtype": "float64"}, None), ({}, torch.float64)])
def test_a_dtype_that_cannot_be_quantized_is_refused(fields, dtype):
    config = transformers.LlamaConfig(**DECODER, **fields)
    with pytest.raises(ModelError, match=r"float64.*cannot be quantized.*torch.bfloat16.*from_pretrained"):
        plan(config, context=TOKENS, dtype=dtype)


def test_holding_more_than_full_precision_is_told():
    short, long = (plan(FAMILIES["llama"](), context=tokens) for tokens in (9, 4000))
    assert "at 9 tokens the quantized layers hold" in short.warnings[0]
    assert long.warnings == ()


@pytest.mark.parametrize(
    "numbers",
    [dict(context=0), dict(context=MAX_CONTEXT + 1), dict(context=2.5), dict(batch=True), dict(gpu_memory=-1)],
    ids=str,
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        plan(FAMILIES["llama"](), **{"context": 9, **numbers})


def test_a_model_that_needs_data_is_refused_in_words(monkeypatch):
    def forward(self, input_ids, **kwargs):
        return int(input_ids.sum())

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match=r"does not run without weights.*measure it with cache.memory"):
        plan(FAMILIES["llama"](), context=TOKENS)


def test_a_backend_for_another_device_is_planned_for(testing_backend):
    capabilities = replace(testing_backend.capabilities, device_types=("cuda",))
    register_backend(replace(testing_backend, capabilities=capabilities), replace=True)
    made = plan(FAMILIES["llama"](), dict(backend="testing"), context=TOKENS)
    assert made.total_bytes == plan(FAMILIES["llama"](), context=TOKENS).total_bytes


def test_the_configuration_of_the_model_stays_as_it_was():
    config = FAMILIES["gpt 2"]()
    before = copy.deepcopy(config.to_dict())
    plan(config, context=TOKENS)
    assert config.to_dict() == before
