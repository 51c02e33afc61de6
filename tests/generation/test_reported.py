"""What was reported of other quantized caches under `generate`, on small models; most have no test elsewhere."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, attach

SMALL = dict(vocab_size=199, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.2)
DECODER = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SMALL
)
GREEDY = dict(max_new_tokens=24, do_sample=False)
QUANTIZED = dict(backend="quanto", nbits_k=8, nbits_v=8, residual_length=32, q_group_size=32)


def build(config, dtype=torch.float32, seed=3):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.case(
    "one mapping of settings for two calls of generate and for two models",
    "it stays as it was; each cache has the layers of its own model",
    report="huggingface/transformers#48700",
)
def test_a_mapping_that_is_shared_is_not_consumed(prompts):
    settings = {**QUANTIZED, "backend_options": {"quanto": {}}, "layers": {0: {"nbits_v": 4}}}
    before = copy.deepcopy(settings)
    for count in (2, 3):
        model = build(transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": count}))
        with attach(model, settings) as attachment:
            texts = [model.generate(prompts, **GREEDY) for _ in range(2)]
        assert torch.equal(*texts)
        assert len(attachment.cache.layers) == count
        assert {layer.settings.key.backend.name for layer in attachment.cache.layers} == {"quanto"}
    assert settings == before


@pytest.mark.case(
    "a forward of Qwen2 with quanto and four tokens, then the length of its cache",
    "works; the length is 4, and 5 after one more token",
    report="huggingface/transformers#40099",
)
def test_a_prompt_shorter_than_the_window():
    model = build(transformers.Qwen2Config(**DECODER))
    cache = KVQ(backend="quanto", nbits_k=4, nbits_v=4, model=model)
    ids = torch.tensor([[5, 17, 93, 4]])
    with torch.inference_mode():
        first = model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 4
        second = model(torch.tensor([[9]]), past_key_values=cache)
        expected = model(torch.tensor([[5, 17, 93, 4, 9]]))
    assert cache.get_seq_length() == 5
    assert torch.allclose(first.logits[:, -1], expected.logits[:, 3], atol=1e-4)
    assert torch.allclose(second.logits[:, -1], expected.logits[:, 4], atol=1e-4)


@pytest.mark.parametrize("way", ["fork", "crop"])
@pytest.mark.case(
    "several questions to one bfloat16 context, on a fork each or by taking the last one back",
    "each answer is the one that its question alone gets; states stay bfloat16",
    report="NVIDIA/kvpress#27",
)
def test_several_questions_to_one_context(prompts, way):
    model = build(transformers.LlamaConfig(**DECODER), torch.bfloat16)
    context = prompts[:1]
    questions = [torch.randint(2, 199, (1, 7), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    settings = {**QUANTIZED, "residual_length": 76}  # 300 tokens and 330 flush equally many: a crop undoes all
    shared = KVQ(settings, model=model)
    with torch.inference_mode():
        model(context, past_key_values=shared)
    answers = []
    for question in questions:
        text = torch.cat([context, question], dim=1)
        alone = KVQ(settings, model=model)
        with torch.inference_mode():
            model(context, past_key_values=alone)
        expected = model.generate(text, past_key_values=alone, **GREEDY)
        cache = shared.fork() if way == "fork" else shared
        answers.append(model.generate(text, past_key_values=cache, **GREEDY))
        assert torch.equal(answers[-1], expected)
        assert cache.materialize(0)[0].dtype is torch.bfloat16
        shared.crop(context.shape[1] - shared.get_seq_length())
        assert shared.get_seq_length() == context.shape[1]
    assert len({tuple(answer[0, -24:].tolist()) for answer in answers}) == 3, "the questions are heard"


@pytest.mark.parametrize("group_size", [64, 80])
@pytest.mark.case(
    "Phi-3, whose head dim of 96 is no multiple of the group size",
    "two groups of 48 a token; nothing is refused or padded",
    report="Blaizzy/mlx-vlm#2061",
)
def test_a_head_dim_that_is_no_multiple_of_the_group_size(prompts, group_size):
    config = {**DECODER, "hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = build(transformers.Phi3Config(**config))
    cache = KVQ(**{**QUANTIZED, "q_group_size": group_size}, axis_key="per_token", axis_value="per_token", model=model)
    text = model.generate(prompts, past_key_values=cache, **GREEDY)
    side = cache.layers[0].side("key")
    assert text.shape[1] == 324
    assert side.store.length >= 256
    assert (side.codec.spec.head_dim, side.codec.spec.group_length) == (96, 48)


@pytest.mark.case(
    "beam search on Lfm2, which mixes convolutions with attention",
    "the tokens are those of DynamicCache while all is exact",
    report="huggingface/transformers#42257",
)
def test_beams_of_a_model_with_convolutions(prompts):
    config = transformers.Lfm2Config(
        **{**DECODER, "num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    )
    model = build(config)
    reference = model.generate(prompts, num_beams=3, **GREEDY)
    cache = KVQ(residual_length=2048, model=model)
    assert torch.equal(model.generate(prompts, past_key_values=cache, num_beams=3, **GREEDY), reference)
    assert len(set(reference[0, 300:].tolist())) >= 8


@pytest.mark.parametrize("sliding", ["keep", "quantize"])
@pytest.mark.case(
    "prompt lookup past the window of a model with sliding layers, which are kept or quantized",
    "the tokens are those of plain greedy decoding",
    report="huggingface/transformers#48280",
)
def test_drafts_past_a_sliding_window(sliding):
    config = transformers.Gemma2Config(
        **DECODER,
        head_dim=16,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    model = build(config)
    phrase = torch.randint(2, 199, (1, 25), generator=torch.Generator().manual_seed(4)).repeat(1, 6)
    reference = model.generate(phrase, past_key_values=DynamicCache(config=config), **GREEDY)
    cache = KVQ(residual_length=2048, sliding=sliding, model=model)
    text = model.generate(
        phrase, past_key_values=cache, prompt_lookup_num_tokens=5, max_matching_ngram_size=1, **GREEDY
    )
    assert torch.equal(text, reference)
    assert len(set(reference[0, 150:].tolist())) >= 8


@pytest.mark.case(
    "Qwen3-Next, three of four layers with linear attention",
    "the attention layers are quantized, the states of the others stay; logits follow those of DynamicCache",
    report="vllm-project/vllm#26646",
)
def test_a_hybrid_of_linear_and_full_attention(prompts):
    config = transformers.Qwen3NextConfig(
        **{**DECODER, "num_hidden_layers": 4, "head_dim": 32},
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=2,
        num_experts_per_tok=2,
    )
    model = build(config)
    with torch.inference_mode():
        caches = [DynamicCache(config=config), KVQ(**QUANTIZED, model=model)]
        logits = []
        for cache in caches:
            model(prompts, past_key_values=cache)
            logits.append(model(torch.full((2, 1), 5), past_key_values=cache).logits)
    assert caches[1].layers[3].side("key").store.length >= 3 * 32
    spread = logits[0].max() - logits[0].min()
    assert (logits[1] - logits[0]).abs().max() <= 0.05 * spread
