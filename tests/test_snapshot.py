"""`snapshot` and `restore`: a cache goes back to a token where a crop cannot."""

import gc
import weakref

import pytest
import torch
import transformers

from kvq import KVQ, EncoderDecoderKVQ
from kvq.errors import CacheStateError

SMALL = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
QUANTIZED = dict(nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32)


def qwen3_next():
    return transformers.Qwen3NextConfig(
        num_key_value_heads=2, head_dim=32, shared_expert_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
        num_experts_per_tok=2, moe_intermediate_size=32, layer_types=["linear_attention", "full_attention"], **SMALL,
    )  # fmt: skip


def gemma3():
    return transformers.Gemma3TextConfig(
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=24,
        layer_types=["sliding_attention", "full_attention"], **SMALL,
    )  # fmt: skip


KINDS = {"linear": qwen3_next, "sliding": gemma3}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(KINDS[request.param](), dtype=torch.float32).eval()


def ids(tokens, seed=1, rows=2):
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def go_on(model, cache, text):
    """Return the logits of a text `[B, T, V]`, fed in two pieces."""
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache).logits for piece in text.split([1, 9], dim=1)], dim=1)


def test_each_question_starts_from_the_same_prefix(model):
    prefix, questions = ids(150), [ids(10, seed) for seed in (2, 3, 4)]
    cache, expected = KVQ(QUANTIZED, model=model), []
    with torch.no_grad():
        model(prefix, past_key_values=cache)
        for question in questions:
            fresh = KVQ(QUANTIZED, model=model)
            model(prefix, past_key_values=fresh)
            expected.append(go_on(model, fresh, question))
    cache.token_ids = prefix
    snapshot = cache.snapshot()
    assert (len(snapshot), repr(snapshot)) == (150, "CacheSnapshot(150 tokens)")
    for question, logits in zip(questions, expected, strict=True):
        assert torch.equal(go_on(model, cache, question), logits)
        assert cache.get_seq_length() == 160
        cache.restore(snapshot)
        assert (cache.get_seq_length(), len(snapshot)) == (150, 150)
        assert torch.equal(cache.token_ids, prefix)


def test_stored_tokens_are_shared_until_the_cache_grows(model):
    cache = KVQ(QUANTIZED, model=model)
    with torch.no_grad():
        model(ids(150), past_key_values=cache)
    [quantized] = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "side")]
    snapshot = cache.snapshot()
    cache.restore(snapshot)
    held, kept = (layers[quantized].side("key").store.segments[0] for layers in (snapshot.fork().layers, cache.layers))
    assert [one.data_ptr() for one in held.parts.values()] == [one.data_ptr() for one in kept.parts.values()]


def test_what_came_after_it_is_let_go(model):
    cache = KVQ(QUANTIZED, model=model)
    with torch.no_grad():
        model(ids(60), past_key_values=cache)
        snapshot = cache.snapshot()
        model(ids(60, 2), past_key_values=cache)
        left = [weakref.ref(layer) for layer in cache.layers]
        cache.restore(snapshot)
        left += [weakref.ref(layer) for layer in cache.layers]
        cache.move_to("cpu")
    gc.collect()
    assert len(snapshot) == 60
    assert [layer() for layer in left] == [None] * 4


def test_the_padding_and_the_batch_come_back():
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(gemma3(), dtype=torch.float32).eval()
    cache = KVQ(QUANTIZED, model=model, padding=[3, 0])
    with torch.no_grad():
        model(ids(80), past_key_values=cache)
    snapshot = cache.snapshot()
    cache.batch_repeat_interleave(2)
    cache.reset()
    with torch.no_grad():
        model(ids(5, rows=3), past_key_values=cache)
    cache.restore(snapshot)
    assert cache.materialize(1)[0].shape[0] == 2
    assert cache.layers[1].padding == cache._padding.counts == (3, 0)


def test_both_attentions_of_an_encoder_decoder_model_go_back():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    encoded = model.get_encoder()(ids(70))
    cache = EncoderDecoderKVQ(QUANTIZED, model=model, cross_attention="quantize")
    read = lambda text: model(encoder_outputs=encoded, decoder_input_ids=text, past_key_values=cache).logits  # noqa: E731
    with torch.no_grad():
        read(ids(90))
        snapshot = cache.snapshot()
        first = read(ids(10, 5))
        read(ids(40, 6))
        cache.restore(snapshot)
        assert torch.equal(read(ids(10, 5)), first)


def test_a_snapshot_of_another_cache_is_refused(model):
    cache, other = KVQ(QUANTIZED, model=model), KVQ({**QUANTIZED, "nbits_k": 8}, model=model)
    with torch.no_grad():
        model(ids(60), past_key_values=cache)
        model(ids(60), past_key_values=other)
    with pytest.raises(CacheStateError, match="another configuration or for another model; take one of this cache"):
        other.restore(cache.snapshot())
    with pytest.raises(CacheStateError, match="another configuration or for another model"):
        KVQ(QUANTIZED).restore(cache.snapshot())
    assert other.get_seq_length() == 60
    cache.fork().restore(cache.snapshot())
