"""`generate` that begins with a cache whose tokens were dropped.

The reference is a loop of forwards over a `DynamicCache` that was cut by hand, with explicit positions.
"""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, attach
from kvq.errors import CacheStateError

CAME, NEW, ANSWER, PADDING = 120, 5, 60, 7
SHAPE = dict(
    vocab_size=300, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=CAME + 1, **SHAPE)),
}
EXACT = {"backend": "native", "residual_length": 4096}
ASKED = dict(max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)


def draw(tokens, seed):
    return torch.randint(3, 300, (2, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded():
    """Return tokens that came and their mask, `[2, 120]`; the first row has left padding."""
    tokens = draw(CAME, 1)
    mask = torch.ones_like(tokens)
    tokens[0, :PADDING] = mask[0, :PADDING] = 0
    return tokens, mask


TOKENS, MASK = left_padded()
ASK = draw(NEW, 2)
POSITIONS = (MASK.cumsum(-1) - 1).clamp_min(0)
KEPT = torch.stack([torch.cat([torch.arange(20), torch.arange(20 + row, CAME, 2)]) for row in range(2)])
"""Of each row its padding and others, `[2, 70]`."""
HELD = KEPT.shape[1]
ALL_THAT_CAME = torch.cat([MASK, torch.ones_like(ASK)], dim=1)
THOSE_LEFT = torch.cat([MASK.gather(1, KEPT), torch.ones_like(ASK)], dim=1)
NEXT = POSITIONS[:, -1:] + 1 + torch.arange(NEW)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@torch.inference_mode()
def read(model, cache):
    model(TOKENS, attention_mask=MASK, position_ids=POSITIONS, past_key_values=cache)
    return cache


def cut(model):
    """Return a `DynamicCache` without a configuration, whose masks count what it holds, with the kept tokens."""
    cache = read(model, DynamicCache())
    for layer in cache.layers:
        index = KEPT[:, None, :, None].expand(-1, 2, -1, 32)
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    return cache


def evicted(model, **fields):
    cache = read(model, KVQ({**EXACT, **fields}, model=model, padding=[PADDING, 0]))
    for index in range(3):
        cache.evict(index, KEPT)
    return cache


@torch.inference_mode()
def answer(model, cache):
    """Return the new tokens and the answer, greedily, token by token and with positions."""
    mask, last, step, tokens = MASK.gather(1, KEPT), POSITIONS[:, -1:], ASK, [ASK]
    for _ in range(ANSWER):
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        positions = last + 1 + torch.arange(step.shape[1])
        logits = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        last, step = positions[:, -1:], logits[:, -1:].argmax(-1)
        tokens.append(step)
    return torch.cat(tokens, dim=1)


RIGHT = {
    "the mask of all that came": dict(attention_mask=ALL_THAT_CAME),
    "positions, and the mask of those left": dict(attention_mask=THOSE_LEFT, position_ids=NEXT),
}


@pytest.mark.parametrize("given", RIGHT.values(), ids=RIGHT)
def test_new_tokens_alone_go_on(model, given):
    expected = answer(model, cut(model))
    assert len(expected[:, NEW:].unique()) > 20
    cache = evicted(model)
    assert torch.equal(model.generate(ASK, past_key_values=cut(model), **given, **ASKED), expected)
    assert torch.equal(model.generate(ASK, past_key_values=cache, **given, **ASKED), expected)
    assert (cache.get_seq_length(), cache.next_position) == (HELD + NEW + ANSWER - 1, CAME + NEW + ANSWER - 1)
    with attach(model, EXACT) as attachment:
        cache = evicted(model)
        assert torch.equal(model.generate(ASK, past_key_values=cache, **given, **ASKED), expected)
        assert attachment.cache is cache


def test_quantized_the_answer_is_that_of_the_same_loop(model):
    fields = dict(nbits_k=8, nbits_v=8, residual_length=4)
    cache = evicted(model, **fields)
    assert cache.layers[0].side("key").store.length
    expected = answer(model, cache.fork())
    assert torch.equal(
        model.generate(ASK, past_key_values=cache, **RIGHT["the mask of all that came"], **ASKED), expected
    )


def test_drafts_go_on_without_padding(model):
    expected = answer(model, cut(model))[1:]
    asked = dict(attention_mask=ALL_THAT_CAME[1:], prompt_lookup_num_tokens=3, **ASKED)
    cache = evicted(model)
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(model.generate(ASK[1:], past_key_values=cache, **asked), expected)
    assert cache.next_position == CAME + NEW + ANSWER - 1


OLD_AND_NEW = torch.cat([TOKENS, ASK], dim=1)
WRONG = {
    "all tokens": (dict(inputs=OLD_AND_NEW, attention_mask=ALL_THAT_CAME), "cuts input_ids"),
    "all tokens without a mask": (dict(inputs=OLD_AND_NEW), "cuts input_ids"),
    "all tokens and positions": (
        dict(
            inputs=OLD_AND_NEW,
            attention_mask=ALL_THAT_CAME,
            position_ids=(ALL_THAT_CAME.cumsum(-1) - 1).clamp_min(0),
        ),
        "cuts input_ids",
    ),
    "the mask of those left": (dict(inputs=ASK, attention_mask=THOSE_LEFT), f"begin at position {HELD}"),
    "pieces": (dict(inputs=ASK, attention_mask=ALL_THAT_CAME, prefill_chunk_size=2), "prefill_chunk_size counts"),
}


@pytest.mark.case(
    "`generate` from a cache whose tokens were dropped, with all tokens, a mask of those left, or in pieces",
    "an attached model refuses it; with `DynamicCache` old tokens are read once more, or positions are wrong",
)
@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_goes_wrong_without_an_error_is_refused_by_an_attached_model(model, given, said):
    """Silently wrong with a `DynamicCache` and without attach; if not, the refusal should go."""
    expected = answer(model, cut(model))
    for cache in (cut(model), evicted(model)):
        found = model.generate(past_key_values=cache, **given, **ASKED)[:, -NEW - ANSWER :]
        assert not any(torch.equal(*rows) for rows in zip(found, expected, strict=True))
    with attach(model, EXACT):
        cache = evicted(model)
        with pytest.raises(CacheStateError, match=rf"to which {CAME} tokens came and whose length is {HELD}: .*{said}"):
            model.generate(past_key_values=cache, **given, **ASKED)
        assert cache.next_position == CAME


def test_the_refusal_reads_every_form_of_the_arguments(model):
    config = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size, embeds = 2, torch.zeros(2, NEW, 128)
    with attach(model, EXACT):
        cache = evicted(model)
        for inputs, given, said in (
            ((OLD_AND_NEW,), {}, "cuts input_ids"),
            ((), dict(input_ids=OLD_AND_NEW), "cuts input_ids"),
            ((), dict(inputs_embeds=embeds, attention_mask=ALL_THAT_CAME), "cuts inputs_embeds"),
            ((), dict(inputs_embeds=embeds, position_ids=NEXT, attention_mask=THOSE_LEFT), "cuts inputs_embeds"),
            ((ASK,), dict(position_ids=NEXT), "cuts input_ids"),
            ((ASK, config), dict(attention_mask=ALL_THAT_CAME), "prefill_chunk_size counts"),
            ((ASK,), dict(attention_mask=ALL_THAT_CAME, generation_config=config), "prefill_chunk_size counts"),
        ):
            with pytest.raises(CacheStateError, match=said):
                model.generate(*inputs, past_key_values=cache, **given, **ASKED)


def test_a_cache_that_holds_all_tokens_is_asked_nothing(model):
    with attach(model, EXACT):
        expected = model.generate(OLD_AND_NEW, attention_mask=ALL_THAT_CAME, **ASKED)
        cache = read(model, KVQ(EXACT, model=model, padding=[PADDING, 0]))
        asked = dict(attention_mask=ALL_THAT_CAME, past_key_values=cache, **ASKED)
        assert torch.equal(model.generate(OLD_AND_NEW, **asked), expected)
