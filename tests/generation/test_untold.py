"""A cache built without `model=`: it learns from the model's first attention which one is active."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from largest_tensor import LargestTensor
from transformers import DynamicCache, EncoderDecoderCache

from kvq import KVQ, KVQCacheConfig
from kvq.attention.attention_detector import report_model
from kvq.attention.handle import PackedStates
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.cache.encoder_decoder import EncoderDecoderKVQ

GREEDY = dict(max_new_tokens=12, do_sample=False)
SMALL = dict(nbits_k=8, nbits_v=8, residual_length=32)
KERNELS = {kernel.name for kernel in OWN_KERNELS}


@pytest.fixture
def ours(llama):
    llama.set_attn_implementation("kvq")
    return llama


@pytest.fixture
def returned(monkeypatch):
    """What `update` returned, in order: whether the keys were packed."""
    kinds = []
    update = KVQ.update

    @torch.compiler.disable  # as what it stands in for
    def note(self, *args, **kwargs):
        states = update(self, *args, **kwargs)
        kinds.append(isinstance(states[0], PackedStates))
        return states

    monkeypatch.setattr(KVQ, "update", note)
    return kinds


def prompt(tokens=700):
    return torch.randint(2, 199, (1, tokens), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def feed(model, cache, *lengths):
    for length in lengths:
        model(prompt(length), past_key_values=cache)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("records", [(), ("compiled",)], ids=["torch alone", "compiled"])
def test_the_example_of_the_readme_is_read_packed(build, returned, give_records, records):
    give_records(*records)
    model = build("llama", dtype=torch.bfloat16)
    model.set_attn_implementation("kvq")
    cache = KVQ(
        KVQCacheConfig(
            backend="quanto", nbits_k=4, nbits_v=2, axis_key=0, axis_value=0, q_group_size=64, residual_length=128,
            compute_dtype=torch.bfloat16, device=model.device,
        )
    )  # fmt: skip
    model.generate(prompt(), past_key_values=cache, **GREEDY)
    assert returned == [False] + [True] * (2 * GREEDY["max_new_tokens"] - 1)
    assert set(cache.memory().attention) <= KERNELS
    assert all(layer.attention in KERNELS for layer in cache.memory().layers)
    history = 2 * cache.get_seq_length() * 64
    with torch.inference_mode(), LargestTensor() as seen:
        model(prompt(1), past_key_values=cache)
    assert seen.elements < history / 2
    model.set_attn_implementation("sdpa")
    with torch.inference_mode(), LargestTensor() as seen:
        model(prompt(1), past_key_values=cache)
    assert seen.elements >= history, "the census sees a materialized layer"


def test_the_tokens_are_those_of_a_cache_that_was_told(ours, prompts, assert_telling):
    expected = ours.generate(prompts, past_key_values=KVQ(**SMALL, model=ours), **GREEDY)
    assert_telling(expected[:, prompts.shape[1] :])
    assert torch.equal(ours.generate(prompts, past_key_values=KVQ(**SMALL), **GREEDY), expected)


def test_a_later_change_of_the_attention_is_respected(ours, returned):
    cache = KVQ(**SMALL)
    for name, expected in (("kvq", [False, True]), ("sdpa", [False, False]), ("eager", [False, False])):
        ours.set_attn_implementation(name)
        feed(ours, cache, 90)
        assert returned[-2:] == expected, name
    ours.set_attn_implementation("kvq")
    feed(ours, cache, 1)
    assert returned[-2:] == [True, True]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_any_other_attention_teaches_nothing(llama, returned, name):
    llama.set_attn_implementation(name)
    cache = KVQ(**SMALL)
    feed(llama, cache, 90, 1, 1)
    assert not any(returned)
    assert cache.attention_detector.name is None
    assert cache.memory().attention == ()


def test_a_layer_in_full_precision_teaches_too(ours, returned):
    feed(ours, KVQ(**SMALL, layers={0: {"full_precision": True}}), 90)
    assert returned == [False, True]


def test_the_module_that_attends_tells_its_own_configuration(returned):
    text = transformers.LlamaConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    ).eval()
    model.set_attn_implementation({"text_config": "kvq", "vision_config": "eager"})
    cache = KVQ(**SMALL)
    feed(model, cache, 90, 1)
    assert returned == [False, True, True, True]
    assert cache.attention_detector.config is model.model.language_model.config
    model.set_attn_implementation({"text_config": "sdpa"})
    feed(model, cache, 1)
    assert returned[-2:] == [False, False]


def test_copies_know_what_was_learnt_and_a_reset_cache_forgets_it(ours, returned):
    cache = KVQ(**SMALL)
    early = cache.fork()
    feed(ours, cache, 90)
    for other in (cache.fork(), copy.deepcopy(cache)):
        assert other.attention_detector.config is ours.config
        feed(ours, other, 1)
        assert returned[-2:] == [True, True]
    assert early.attention_detector.name is None, "what one learns later is its own"
    cache.reset()
    assert cache.attention_detector.name is None
    told = KVQ(**SMALL, model=ours)
    feed(ours, told, 90)
    told.reset()
    assert told.attention_detector.name == "kvq", "what was told stays"


def test_nothing_is_kept_alive_and_tensors_stay_plain():
    cache = KVQ(**SMALL)
    keys, values = cache.update(*torch.randn(2, 1, 2, 9, 64), 0)
    assert not vars(keys)
    assert type(copy.deepcopy(keys)) is type(pickle.loads(pickle.dumps(keys))) is torch.Tensor  # noqa: S301  # ours
    held = weakref.ref(cache), weakref.ref(cache.attention_detector), weakref.ref(keys)
    del cache, keys, values
    gc.collect()
    assert [one() for one in held] == [None, None, None]
    report_model(torch.zeros(1), transformers.LlamaConfig())


def test_keys_of_another_cache_or_thread_teach_nothing(ours):
    first, second = KVQ(**SMALL), KVQ(**SMALL)
    keys, _ = first.update(*torch.randn(2, 1, 2, 9, 64), 0)
    seen = threading.Thread(target=report_model, args=(keys, ours.config))
    seen.start()
    seen.join()
    assert first.attention_detector.name is None
    second.update(*torch.randn(2, 1, 2, 9, 64), 0)
    report_model(keys, ours.config)
    assert (first.attention_detector.name, second.attention_detector.name) == (None, None)


def test_gradients_flow_where_nothing_was_told(ours):
    cache = KVQ(**SMALL)
    loss = ours(prompt(90), past_key_values=cache).logits.sum()
    loss.backward()
    assert ours.model.layers[0].self_attn.k_proj.weight.grad.ne(0).any()


@pytest.mark.costly
def test_a_compiled_model_teaches_as_well(ours, returned):
    torch._dynamo.reset()
    cache, plain = KVQ(**SMALL), KVQ(**SMALL, model=ours)
    compiled = torch.compile(ours, backend="eager")
    with torch.inference_mode():
        for tokens in (90, 1, 1):
            ids = prompt(tokens)
            expected = ours(ids, past_key_values=plain).logits
            torch.testing.assert_close(compiled(ids, past_key_values=cache).logits, expected)
    assert returned[-2:] == [True, True]
    assert set(cache.memory().attention) <= KERNELS


@pytest.mark.parametrize("cross", ["keep", "quantize"])
def test_both_caches_of_an_encoder_decoder_model(cross, assert_telling):
    torch.manual_seed(7)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=199, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=512,
            init_std=0.6,
        )
    ).eval()  # fmt: skip
    settings = dict(max_new_tokens=40, min_new_tokens=40, do_sample=True, top_k=20)
    exact = dict(residual_length=512)
    torch.manual_seed(1)
    reference = model.generate(prompt(70), **settings)
    assert_telling(reference)
    model.set_attn_implementation("kvq")
    told = EncoderDecoderKVQ(**exact, model=model, cross_attention=cross)
    untold = EncoderDecoderCache(KVQ(**exact), KVQ(**exact) if cross == "quantize" else DynamicCache())
    untold.check_dynamic_cache = lambda method: None
    for cache in (told, untold):
        torch.manual_seed(1)
        assert torch.equal(model.generate(prompt(70), past_key_values=cache, **settings), reference)
    assert untold.self_attention_cache.attention_detector.name == "kvq"
