"""Which tokens a cache holds, as far as it was told: compared with a prompt, cropped to it, never stale."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvq import KVQ
from kvq.errors import CacheStateError, StatesError

SMALL = {"backend": "native", "q_group_size": 16, "residual_length": 16}
SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def draw(length, batch=1, seed=0):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def read(model, ids, cache=None):
    """Return a cache that holds the tokens `ids` and knows it."""
    cache = KVQ(model=model, **SMALL) if cache is None else cache
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.token_ids = ids
    return cache


def feed(cache, tokens=1, batch=1):
    for layer in range(len(cache.layers)):
        cache.update(*torch.randn(2, batch, 2, tokens, 16), layer)


@pytest.mark.case("another prompt than the one that a loaded cache holds", "`count_matching`, `crop_to_prefix`")
def test_a_loaded_cache_goes_on_with_a_prompt_that_differs_in_its_middle(model, tmp_path):
    ids = draw(120)
    read(model, ids).save(tmp_path / "cache.safetensors", token_ids=torch.cat([ids, ids[:, :1]], dim=1))
    cache = KVQ.load(tmp_path / "cache.safetensors", model=model)
    other = torch.cat([ids[:, :90], draw(40, seed=1)], dim=1)
    other[:, 90] = (ids[:, 90] + 1) % 49 + 1
    assert cache.count_matching(other) == 90
    assert cache.crop_to_prefix(other) == 90 == cache.get_seq_length()
    assert torch.equal(cache.token_ids, ids[:, :90])
    expected = read(model, ids)
    expected.crop(-30)
    texts = [
        model.generate(other, past_key_values=one, max_new_tokens=25, do_sample=False, pad_token_id=0)
        for one in (cache, expected)
    ]
    assert torch.equal(*texts)
    assert len(set(texts[0][0, 130:].tolist())) >= 8


def test_the_same_prompt_again_leaves_its_last_token_to_be_fed(model):
    ids = draw(60)
    cache = read(model, ids)
    assert cache.count_matching(ids) == 60
    assert cache.crop_to_prefix(ids) == 59
    fresh = model.generate(ids, past_key_values=KVQ(model=model, **SMALL), max_new_tokens=3, do_sample=False)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False).shape == fresh.shape


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda ids: ids, 40),
        (lambda ids: ids[:, :13], 13),
        (lambda ids: torch.cat([ids, ids], dim=1), 40),
        (lambda ids: ids[:, :0], 0),
        (lambda ids: ids.int(), 40),
        (lambda ids: ids + (torch.arange(40) == 7) * torch.tensor([[0], [1]]), 7),
        (lambda ids: ids + (torch.arange(40) == 0), 0),
    ],
    ids=["the same", "fewer", "more", "none", "another integer dtype", "one row differs", "the first differs"],
)
def test_the_common_prefix_is_that_of_the_row_that_agrees_least(model, given, expected):
    ids = draw(40, batch=2)
    cache = read(model, ids)
    assert cache.count_matching(given(ids)) == expected


def test_left_padding_compares_like_any_token(model):
    ids = draw(40, batch=2)
    ids[0, :9] = 0
    cache = read(model, ids, KVQ(model=model, padding=[9, 0], **SMALL))
    longer = torch.cat([ids, draw(5, batch=2, seed=3)], dim=1)
    assert cache.count_matching(longer) == 40
    shifted = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    assert cache.count_matching(shifted) < 10


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (torch.ones(2, 5, dtype=torch.long), "2 rows, the cache holds 1"),
        (torch.ones(5, dtype=torch.long), r"torch.int64 \[5\]"),
        (torch.ones(1, 5), "torch.float32"),
        ([[1, 2]], "list"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused(model, ids, told):
    with pytest.raises(StatesError, match=told):
        read(model, draw(20)).count_matching(ids)


def test_unknown_tokens_are_said_to_be_unknown():
    cache = KVQ(**SMALL)
    assert cache.token_ids is None
    for ask in (cache.count_matching, cache.crop_to_prefix):
        with pytest.raises(CacheStateError, match="does not know the tokens"):
            ask(draw(5))


@pytest.mark.parametrize("kind", ["sliding", "linear"])
def test_a_cache_that_cannot_go_back_says_so_and_stays_as_it_is(kind):
    torch.manual_seed(0)
    if kind == "sliding":
        config = transformers.Gemma2Config(**SIZES, num_hidden_layers=2, sliding_window=16, head_dim=16)
    else:
        linear = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
        config = transformers.Qwen3NextConfig(
            **SIZES, **linear, num_hidden_layers=2, head_dim=16, layer_types=["linear_attention", "full_attention"],
            num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = draw(40)
    cache = read(model, ids)
    changed = ids.clone()
    changed[:, 30] = changed[:, 30] % 49 + 1
    with pytest.raises(CacheStateError, match="slide and have forgotten" if kind == "sliding" else "cannot go back"):
        cache.crop_to_prefix(changed)
    assert cache.get_seq_length() == 40
    assert torch.equal(cache.token_ids, ids)
    assert cache.crop_to_prefix(torch.cat([ids, changed], dim=1)) == 40, "nothing to crop"


def test_ids_are_never_stale(model):
    ids = draw(40, batch=2)
    cache = read(model, ids)
    cache.token_ids = torch.cat([ids, ids[:, :3]], dim=1)
    assert cache.token_ids.shape[1] == 43, "the tokens that come next may be told"
    assert cache.count_matching(cache.token_ids) == 40, "but are not held"
    fork = cache.fork()
    feed(cache, 2, batch=2)
    assert torch.equal(cache.token_ids, ids), "what came may have been others"
    assert cache.count_matching(torch.cat([ids, ids], dim=1)) == 40
    cache.crop(-12)
    assert torch.equal(cache.token_ids, ids[:, :30])
    feed(cache, 5, batch=2)
    assert torch.equal(cache.token_ids, ids[:, :30])
    assert fork.token_ids.shape[1] == 43, "a fork has its own"
    for change, rows in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda: cache.batch_repeat_interleave(2), [1, 1, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([True, False, True, True])), [1, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([2, 0])), [0, 1]),
    ):
        change()
        assert torch.equal(cache.token_ids, ids[rows, :30])
    cache.reset()
    assert cache.token_ids is None


def test_ids_that_a_caller_writes_to_stay_as_they_were(model):
    ids = draw(20)
    cache = read(model, ids)
    before = ids.clone()
    ids.zero_()
    assert torch.equal(cache.token_ids, before)


def test_a_loaded_cache_is_saved_with_its_tokens(model, tmp_path):
    ids = draw(40)
    read(model, ids).save(tmp_path / "one.safetensors")
    loaded = KVQ.load(tmp_path / "one.safetensors")
    assert torch.equal(loaded.token_ids, ids)
    feed(loaded)
    loaded.save(tmp_path / "two.safetensors")
    assert KVQ.load(tmp_path / "two.safetensors").token_ids is None, "one token is not known"


@pytest.mark.case("`num_return_sequences=3` on a cache of one row", "StatesError names `batch_repeat_interleave(3)`")
@pytest.mark.parametrize("mode", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_more_sequences_of_one_prefilled_row(model, mode):
    ids = draw(60)
    whole = torch.cat([ids, ids[:, :1]], dim=1)
    cache = read(model, ids)
    with pytest.raises(StatesError, match=r"cache\.batch_repeat_interleave\(3\).*cache\.fork\(\)"):
        model.generate(whole, past_key_values=cache, max_new_tokens=3, pad_token_id=0, **mode)
    assert cache.get_seq_length() == 60
    repeated = cache.fork()
    repeated.batch_repeat_interleave(3)
    found = []
    for one in (repeated, KVQ(model=model, **SMALL)):
        torch.manual_seed(1)
        found.append(model.generate(whole, past_key_values=one, max_new_tokens=20, pad_token_id=0, **mode))
    assert found[0].shape == found[1].shape
    assert found[0].shape[0] == mode.get("num_return_sequences", 1)
    with pytest.raises(StatesError, match="use a new cache") as refused:
        repeated.update(*torch.randn(2, 4, 2, 1, 16), 0)
    assert "repeat" not in str(refused.value), "4 is no multiple of 3"
