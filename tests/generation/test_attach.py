"""`attach`: what it changes, what wins over it, and that it leaves no trace."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, attach
from kvq.attention import entry
from kvq.errors import CacheStateError, ConfigError, ModelError
from kvq.transformers_seams.private_names import pass_cache

GREEDY = dict(max_new_tokens=12, do_sample=False)


def trace(model):
    return model.config._attn_implementation, "_prepare_cache_for_generation" in vars(model)


def test_every_generate_gets_a_fresh_cache(llama, prompts):
    before = trace(llama)
    with attach(llama, nbits_k=4, nbits_v=4) as attachment:
        assert attachment.cache is None
        llama.generate(prompts, **GREEDY)
        first = attachment.cache
        llama.generate(prompts[:, :50], **GREEDY)
        assert attachment.cache is not first
        assert attachment.cache.get_seq_length() == 61
        assert first.config.nbits_v == 4
    assert trace(llama) == before


def test_the_kvq_attention_reads_handles(llama, prompts, monkeypatch):
    seen = []
    original = entry.attend
    monkeypatch.setattr(entry, "attend", lambda *a, **k: seen.append(a[2]) or original(*a, **k))
    with attach(llama):
        llama.generate(prompts, **GREEDY)
    assert len(seen) == 12 * 2
    assert seen[-1].key.length == 311


def test_a_handle_works_without_the_context(llama, prompts):
    handle = attach(llama)
    llama.generate(prompts, **GREEDY)
    handle.detach()
    handle.detach()
    assert trace(llama) == ("sdpa", False)


def test_a_users_own_cache_wins(llama, prompts):
    own, plain = KVQ(nbits_k=8, nbits_v=8), DynamicCache()
    reference = llama.generate(prompts, **GREEDY)
    with attach(llama, nbits_k=2, nbits_v=2) as attachment:
        llama.generate(prompts, past_key_values=own, **GREEDY)
        llama.generate(prompts, past_key_values=plain, **GREEDY)
        with pytest.warns(UserWarning, match="'static' of the generation config wins"):
            assert torch.equal(llama.generate(prompts, cache_implementation="static", **GREEDY), reference)
        llama.generate(prompts, use_cache=False, max_new_tokens=2, do_sample=False)
        assert attachment.cache is None
    assert own.get_seq_length() == plain.get_seq_length() == 311


def test_a_tokenizer_for_stop_strings_changes_no_reader(llama, prompts):
    readers = []
    with attach(llama) as attachment:
        for given in ({}, {"tokenizer": object()}):
            llama.generate(prompts, **given, **GREEDY)
            readers.append([layer.kernel_cache.last_reader for layer in attachment.cache.layers])
    assert readers[0] == readers[1]


def test_it_is_undone_when_generation_fails(llama, prompts):
    before = trace(llama)
    with pytest.raises(IndexError), attach(llama):
        llama.generate(prompts + 100_000, **GREEDY)
    assert trace(llama) == before


def test_nested_attachments_end_in_reverse_order(llama, prompts):
    outer = attach(llama, nbits_k=4, nbits_v=4)
    inner = attach(llama, nbits_k=2, nbits_v=2)
    llama.generate(prompts, **GREEDY)
    assert inner.cache.config.nbits_k == 2
    with pytest.raises(CacheStateError, match="reverse order"):
        outer.detach()
    inner.detach()
    llama.generate(prompts, **GREEDY)
    assert outer.cache.config.nbits_k == 4
    outer.detach()
    assert trace(llama) == ("sdpa", False)


def test_what_cannot_work_is_refused_at_once(llama):
    with pytest.raises(ConfigError, match="nbits_k"):
        attach(llama, nbits_k=5)
    with pytest.raises(ModelError, match="nothing in this model would be quantized"):
        attach(llama, layers={"0-1": {"full_precision": True}})
    with pytest.raises(ModelError, match="not a model of transformers"):
        attach(torch.nn.Linear(2, 2))
    assert trace(llama) == ("sdpa", False)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_users_attention_implementation_comes_back(llama, prompts, implementation):
    llama.set_attn_implementation(implementation)
    reference = llama.generate(prompts, **GREEDY)
    with attach(llama, residual_length=2048):
        assert torch.equal(llama.generate(prompts, **GREEDY), reference)
    assert trace(llama) == (implementation, False)


def test_a_pipeline_uses_the_attached_cache(llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(199)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    generate = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in range(2, 190))
    plain = generate(text, max_new_tokens=10, do_sample=False)[0]["generated_text"]
    with attach(llama, residual_length=2048) as attachment:
        assert generate(text, max_new_tokens=10, do_sample=False)[0]["generated_text"] == plain
        assert attachment.cache.get_seq_length() == 188 + 9


def test_eager_arguments_are_not_dropped(llama, prompts):
    """A softcap, which SDPA would ignore or refuse, reaches the model's own eager attention."""
    attention = llama.model.layers[0].self_attn
    query, keys, values = torch.randn(3, 1, 2, 6, 64)
    seen = {}

    def eager(module, query, key, value, mask, **options):
        seen.update(options, mask=mask)
        return torch.zeros(1, 6, 2, 64), None

    module = transformers.models.llama.modeling_llama
    original, module.eager_attention_forward = module.eager_attention_forward, eager
    try:
        entry.kvq_attention_forward(attention, query, keys, values, None, scaling=0.1, softcap=30.0)
    finally:
        module.eager_attention_forward = original
    assert seen["softcap"] == 30.0
    allowed = seen["mask"][0, 0] == 0
    assert torch.equal(allowed, torch.ones(6, 6, dtype=torch.bool).tril()), "the causal mask is written out"


@pytest.mark.case("a static cache under the kvq attention", "the tokens of a plain model; its empty half is masked")
@pytest.mark.parametrize("length", [1, 2, 300])
def test_a_static_cache_is_masked(llama, prompts, length):
    prompts = prompts[:, :length]
    reference = llama.generate(prompts, **GREEDY)
    expected = llama(prompts).logits
    llama.set_attn_implementation("kvq")
    assert torch.equal(llama.generate(prompts, cache_implementation="static", **GREEDY), reference)
    static = transformers.StaticCache(config=llama.config, max_cache_len=400)
    with torch.inference_mode():
        found = llama(prompts, **pass_cache(llama, static)).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_hook_of_somebody_else_survives(llama, prompts):
    handle = attach(llama, residual_length=2048)
    llama.generate = lambda *_args, **_options: "theirs"
    del llama.init_continuous_batching
    handle.detach()
    assert llama.generate(prompts) == "theirs"
    del llama.generate
    assert trace(llama) == ("sdpa", False)


def test_an_attention_that_the_user_chose_meanwhile_stays(llama):
    with attach(llama):
        llama.set_attn_implementation("eager")
    assert trace(llama) == ("eager", False)
