"""Drafts by layers of the model itself, by a drafter that reads its cache, and by one with another tokenizer.

Also blocks that are denoised beside a cache.
"""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache

from kvq import KVQ, attach
from kvq.errors import ModelError

SMALL = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
    eos_token_id=None,
)  # fmt: skip
EXACT = dict(residual_length=2048)
GREEDY = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
GEMMA = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"], head_dim=32, global_head_dim=32)


def build(config, auto_class=transformers.AutoModelForCausalLM, seed=3):
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:  # it would say what it heard last, over and over
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def ids(tokens=60, rows=1):
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(1))


def assert_same(model, text, **options):
    """Check both ways to a quantized cache; the window holds everything."""
    reference = model.generate(text, past_key_values=DynamicCache(config=model.config), **options)
    assert len(set(reference[0, text.shape[1] :].tolist())) >= 8
    assert torch.equal(model.generate(text, past_key_values=KVQ(EXACT, model=model), **options), reference)
    with attach(model, EXACT) as attachment:
        assert torch.equal(model.generate(text, **options), reference)
    assert attachment.cache.get_seq_length() >= text.shape[1] + 20


@pytest.mark.skipif(not hasattr(transformers.GenerationConfig(), "use_mtp"), reason="no multi-token prediction here")
@pytest.mark.case("multi-token prediction (`use_mtp`)", "the tokens of DynamicCache")
def test_layers_that_predict_more_tokens(monkeypatch):
    from transformers.modeling_layers import MtpModel

    config = transformers.Glm4MoeConfig(
        head_dim=32, moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, num_nextn_predict_layers=2, **SMALL,
    )  # fmt: skip
    model, drafted = build(config), []

    def random_layers(main_model, **_options):  # instead of those in the files of a checkpoint
        torch.manual_seed(5)
        made = MtpModel(main_model, main_model.config.get_text_config().num_mtp_layers).eval()
        drafted.append(made)
        return made

    monkeypatch.setattr(MtpModel, "from_pretrained", random_layers)
    assert_same(model, ids(), use_mtp=True, **GREEDY)
    assert len(drafted) == 3


@pytest.mark.skipif(not hasattr(transformers, "Gemma4AssistantConfig"), reason="no Gemma 4 drafter in this release")
@pytest.mark.case(
    "Gemma 4 with its drafter, which reads the keys and values of the model", "the tokens of DynamicCache"
)
def test_a_drafter_that_reads_the_cache_of_the_model():
    text = {**GEMMA, **{name: SMALL[name] for name in SMALL if name != "vocab_size"}}
    shared = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    model = build(transformers.Gemma4TextConfig(vocab_size=99, num_kv_shared_layers=0, **shared, **text))
    own = transformers.Gemma4TextConfig(vocab_size=99, num_kv_shared_layers=0, **shared, **text)
    try:
        drafter = build(transformers.Gemma4AssistantConfig(text_config=own, backbone_hidden_size=64), seed=4)
    except ValueError as error:  # in 5.23
        pytest.skip(f"this release builds no drafter: {error}")
    drafter.generation_config.num_assistant_tokens = 4
    assert_same(model, ids(), assistant_model=drafter, **GREEDY)


def words(names):
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=names[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=names[0], unk_token=names[1], bos_token=names[2]
    )


@pytest.mark.case("a draft model with a tokenizer of its own", "the tokens of DynamicCache")
def test_two_tokenizers():
    names = ["[PAD]", "[UNK]", "[BOS]", *(f"word{number}" for number in range(96))]
    model = build(transformers.LlamaConfig(head_dim=32, **SMALL))
    draft = build(transformers.LlamaConfig(head_dim=32, **{**SMALL, "vocab_size": 105}))
    own, other = words(names), words([*names[:3], *(f"other{number}" for number in range(6)), *reversed(names[3:])])
    options = dict(assistant_model=draft, tokenizer=own, assistant_tokenizer=other, **GREEDY)
    assert_same(model, ids(), **options)


@pytest.mark.skipif(not hasattr(transformers, "DiffusionGemmaTextConfig"), reason="no DiffusionGemma in this release")
@pytest.mark.case(
    "DiffusionGemma, whose blocks are denoised beside the cache", "exact with a KVQ; `attach` is refused with the way"
)
def test_blocks_that_are_denoised_beside_the_cache():
    text = {name: SMALL[name] for name in SMALL if name != "num_key_value_heads"}
    config = transformers.DiffusionGemmaConfig(
        text_config=dict(
            num_key_value_heads=2, num_experts=2, top_k_experts=2, moe_intermediate_size=32, **GEMMA, **text
        ),
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        canvas_length=8, image_token_id=97, boi_token_id=96, eoi_token_id=95,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    settings = dict(max_new_tokens=24, max_denoising_steps=4)

    def generate(**options):
        torch.manual_seed(11)
        return model.generate(ids(), **settings, **options).sequences

    reference = generate()
    assert len(set(reference[0, 60:].tolist())) >= 8
    cache = KVQ(EXACT, model=model)
    assert torch.equal(generate(past_key_values=cache), reference)
    assert cache.get_seq_length() == 60 + 16, "the last block is returned, not read"
    with pytest.raises(ModelError, match=r"pass past_key_values=KVQ\(config, model=model\) to generate"):
        attach(model, EXACT)
    assert torch.equal(generate(), reference)
