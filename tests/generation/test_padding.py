"""Left padding that nobody told a cache of: read from the mask where it is seen, else warned of."""

import warnings

import pytest
import torch
import transformers

from kvq import KVQ, EncoderDecoderKVQ
from kvq.cache.padding import left_padding, looks_padded
from kvq.transformers_seams.private_names import pass_cache

SMALL = dict(nbits_k=4, nbits_v=2, residual_length=32, q_group_size=32, sink_length=4)
GREEDY = dict(max_new_tokens=4, do_sample=False)


def caught(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [one for one in found if "padded on the left" in str(one.message)]


@pytest.mark.case(
    "a cache of one's own in a left-padded batch", "the mask tells the padding under attn_implementation=kvq"
)
@pytest.mark.parametrize("knows_model", [True, False])
@pytest.mark.parametrize("how", ["generate", "forward"])
def test_the_mask_tells_the_padding(llama, padded, knows_model, how):
    llama.set_attn_implementation("kvq")
    model = llama if knows_model else None
    own, told = KVQ(SMALL, model=model), KVQ(SMALL, model=model, padding=[41, 0])
    for cache in (own, told):
        if how == "generate":
            assert caught(lambda cache=cache: llama.generate(**padded, past_key_values=cache, **GREEDY)) == []
        else:
            with torch.inference_mode():
                llama(**padded, **pass_cache(llama, cache))
    for layer, expected in zip(own.layers, told.layers, strict=True):
        assert layer.side("key").sinks.starts == expected.side("key").sinks.starts == (41, 0)
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


def test_it_is_learnt_anew_after_a_reset(llama, padded):
    llama.set_attn_implementation("kvq")
    cache = KVQ(SMALL, model=llama)
    for count in (41, 17):
        mask = torch.ones_like(padded["attention_mask"])
        mask[0, :count] = 0
        llama.generate(padded["input_ids"], attention_mask=mask, past_key_values=cache, **GREEDY)
        assert cache.layers[0].side("key").sinks.starts == (count, 0)
        cache.reset()


def test_padding_that_was_told_is_not_learnt(llama, padded):
    llama.set_attn_implementation("kvq")
    cache = KVQ(SMALL, model=llama, padding=[40, 0])
    llama.generate(**padded, past_key_values=cache, **GREEDY)
    assert cache.layers[0].side("key").sinks.starts == (40, 0)


def test_the_mask_of_another_cache_is_not_taken(llama, padded, prompts):
    """A cache that waits is told by the mask that is made for it."""
    llama.set_attn_implementation("kvq")
    waiting = KVQ(SMALL, model=llama)
    llama.generate(**padded, past_key_values=KVQ(SMALL, model=llama), **GREEDY)
    llama.generate(prompts, past_key_values=waiting, **GREEDY)
    assert waiting.layers[0].side("key").sinks.starts == (0, 0)


@pytest.mark.case("the same under another attention, which shows the cache no mask", "one warning that names padding=")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_that_cannot_be_seen_is_warned_of(llama, padded, implementation):
    llama.set_attn_implementation(implementation)
    found = caught(lambda: llama.generate(**padded, past_key_values=KVQ(SMALL, model=llama), **GREEDY))
    assert len(found) == 1
    assert found[0].filename == __file__
    told = KVQ(SMALL, model=llama, padding=[41, 0])
    assert caught(lambda: llama.generate(**padded, past_key_values=told, **GREEDY)) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_position_betrays_padding(build, padded, prompts, family, dtype):
    model = build(family, dtype=dtype)
    assert len(caught(lambda: model.generate(**padded, past_key_values=KVQ(SMALL, model=model), **GREEDY))) == 1
    assert caught(lambda: model.generate(prompts, past_key_values=KVQ(SMALL, model=model), **GREEDY)) == []


def test_what_looks_padded():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 6, 8, generator=generator)
    assert not looks_padded(states)
    assert not looks_padded(states[:1])
    assert not looks_padded(states[:, :, :1])
    assert not looks_padded(states[:, :, :0])
    assert not looks_padded(states[:, :0])
    assert not looks_padded(states.to("meta"))
    padded = states.clone()
    padded[1, :, :4] = padded[1, :, :1]
    assert looks_padded(padded)
    assert looks_padded(padded.bfloat16())
    assert not looks_padded(padded[1:2].expand(3, -1, -1, -1)), "all rows begin alike, as with one prompt several times"


def test_the_padding_in_a_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    assert left_padding(mask) == [2, 0, 1]
    assert left_padding(mask.bool()) == [2, 0, 1]
    assert left_padding(torch.ones(2, 3)) is None
    assert left_padding(None) is None
    assert left_padding(torch.zeros(1, 1, 2, 2)) is None


def starts(cache):
    return cache.layers[0].side("key").sinks.starts


class TestAnotherBatch:
    """Padding that was learnt belongs to the batch that it came with."""

    def masked(self, model, cache, *counts):
        ids = torch.randint(2, 199, (len(counts), 80), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        for row, count in enumerate(counts):
            mask[row, :count] = 0
        with torch.inference_mode():
            model(ids, attention_mask=mask, **pass_cache(model, cache))

    def test_it_is_learnt_anew_after_a_crop_to_nothing(self, llama):
        llama.set_attn_implementation("kvq")
        cache = KVQ(SMALL, model=llama)
        self.masked(llama, cache, 9, 0)
        cache.crop(-80)
        self.masked(llama, cache, 0, 5, 3)
        assert starts(cache) == (0, 5, 3)

    def test_padding_that_was_told_stays(self, llama):
        llama.set_attn_implementation("kvq")
        cache = KVQ(SMALL, model=llama, padding=[9, 0])
        self.masked(llama, cache, 9, 0)
        cache.crop(-80)
        self.masked(llama, cache, 0, 5)
        assert starts(cache) == (9, 0)

    def test_a_forward_that_failed_teaches_nothing_for_good(self, llama):
        llama.set_attn_implementation("kvq")
        cache = KVQ(SMALL, model=llama)
        hook = llama.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.masked(llama, cache, 9, 0)
        hook.remove()
        self.masked(llama, cache, 0, 5, 3)
        assert starts(cache) == (0, 5, 3)

    def test_a_fork_learns_by_itself(self, llama):
        llama.set_attn_implementation("kvq")
        cache = KVQ(SMALL, model=llama)
        other = cache.fork()
        self.masked(llama, cache, 9, 0)
        self.masked(llama, other, 0, 5)
        assert (starts(cache), starts(other)) == ((9, 0), (0, 5))

    def test_a_chunk_that_is_all_padding_is_warned_of(self, llama):
        llama.set_attn_implementation("kvq")
        cache = KVQ(SMALL, model=llama)
        mask = torch.zeros(2, 8, dtype=torch.long)
        mask[1] = 1
        with pytest.warns(UserWarning, match="a whole chunk of left padding"), torch.inference_mode():
            llama(torch.ones_like(mask), attention_mask=mask, **pass_cache(llama, cache))

    def test_an_encoder_decoder_cache_forgets_it_too(self):
        config = transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        cache = EncoderDecoderKVQ(SMALL, model=config)
        cache.self_attention_cache.learn_padding(torch.tensor([[0, 1], [1, 1]]))
        assert cache.layers[0].padding == (1, 0)
        cache.reset()
        assert cache.layers[0].padding is None
        assert not cache.self_attention_cache._padding.is_settled
