"""Tokens dropped from layers that slide: the window then counts those that are left.

The reference is a `DynamicCache` made without a configuration, which holds all tokens, cut by hand; where all layers
slide, with a mask that is drawn here.
"""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, attach
from kvq.errors import CacheStateError, StatesError
from kvq.layers.sliding_layer import SlidingKVQLayer

pytestmark = pytest.mark.filterwarnings("error:attention kernel")
WINDOW, READ, TOTAL, PADDING = 96, 80, 330, 13
LONG = 200
"""A prompt behind which layers have slid over their window, and forgotten the padding too."""
FIRST = LONG - WINDOW + 1
"""The first token of it that the next query sees."""
SHAPE = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "mistral": lambda: transformers.MistralConfig(sliding_window=WINDOW, **SHAPE),
    "phi3": lambda: transformers.Phi3Config(sliding_window=WINDOW, **SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], **SHAPE
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"], num_local_experts=2,
        num_experts_per_tok=1, intermediate_size_mlp=64, **SHAPE,
    ),
}  # fmt: skip
ALL_SLIDE = ("mistral", "phi3")
EXACT = dict(backend="native", residual_length=4096, sliding="quantize")
FIELDS = dict(backend="native", nbits_k=4, nbits_v=4, residual_length=8, q_group_size=16, sliding="quantize")
ENDS = [READ, READ + 9, READ + 10, READ + 60, READ + 61, READ + 200, TOTAL]
"""Pieces that go on behind the eviction, one of them longer than the window."""


def build(name, std=0.2):
    """Return a model; with large weights what it says is lively, with small ones another code changes little."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config.initializer_range = std
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def mistral():
    return build("mistral")


def text(*, padded=True):
    ids = torch.randint(2, 99, (2, TOTAL), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :PADDING] = mask[0, :PADDING] = 0
    return ids, mask


def kept_tokens():
    """Return a choice for each row, `[2, K]`: the padding of both, and others that differ."""
    chosen = [torch.arange(PADDING)]
    rows = []
    for row in range(2):
        rest = torch.randperm(READ - PADDING, generator=torch.Generator().manual_seed(row))[:45].sort().values
        rows.append(torch.cat([*chosen, PADDING + rest]))
    return torch.stack(rows)


@torch.inference_mode()
def prefill(model, cache, *, padded=True):
    ids, mask = text(padded=padded)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids[:, :READ], past_key_values=cache, attention_mask=mask[:, :READ], position_ids=positions[:, :READ])
    return cache


def cut(plain, kept):
    for layer in plain.layers:
        rows = [[states[row][:, kept[row]] for row in range(2)] for states in (layer.keys, layer.values)]
        layer.keys, layer.values = (torch.stack(one) for one in rows)
    return plain


def evict(cache, kept):
    for index in range(len(cache.layers)):
        cache.evict(index, kept)
    return cache


def draw_mask(mask, places, new):
    """Return the mask `[B, 1, new, T]` by which each of the last `new` tokens sees itself and the 95 places before it.

    Args:
        mask: `[B, T]`, 0 for padding.
        places: `[B, T]`, the place of each token.
        new: how many of them are read now.
    """
    queries, tokens = places[:, -new:, None], places[:, None]
    visible = (tokens <= queries) & (tokens > queries - WINDOW) & mask[:, None].bool()
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


@torch.inference_mode()
def go_on(model, cache, kept, *, padded=True, places=None, watch=lambda cache: None):
    """Return the logits of the tokens behind the eviction, read piece by piece.

    The mask is drawn by `places`, `[B, T]` of the tokens that are left; where there are none, transformers draws it.
    """
    ids, mask = text(padded=padded)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    left = torch.cat([mask.gather(1, kept), mask[:, READ:]], dim=1)
    logits = []
    for start, stop in pairwise(ENDS):
        length = kept.shape[1] + stop - READ
        given = left[:, :length]
        if places is not None:
            given = draw_mask(given, places[:, :length], stop - start)
        more = dict(attention_mask=given, position_ids=positions[:, start:stop])
        logits.append(model(ids[:, start:stop], past_key_values=cache, **more).logits)
        watch(cache)
    return torch.cat(logits, dim=1)


def count_left(kept):
    """Return places that count the tokens that are left, as the masks of transformers do."""
    return torch.arange(kept.shape[1] + TOTAL - READ).expand(2, -1)


def check_bound(cache):
    sliding = [layer for layer in cache.layers if isinstance(layer, SlidingKVQLayer)]
    assert sliding
    for layer in sliding:
        assert layer.held_length <= layer.window_length - 1 + layer.chunk_length - 1


def assert_close(found, expected, bound=2e-5):
    assert (found - expected).abs().max() <= bound * (expected.max() - expected.min())


@pytest.mark.parametrize("padded", [False, True])
def test_exact_states_give_the_logits_of_a_cache_that_was_cut(model, padded):
    kept = kept_tokens()
    places = count_left(kept) if model.config.model_type in ALL_SLIDE else None
    padding = [PADDING, 0] if padded else None

    def check():
        cache = evict(prefill(model, KVQ(EXACT, model=model, padding=padding), padded=padded), kept)
        assert (cache.get_seq_length(), cache.next_position) == (kept.shape[1], READ)
        assert_close(go_on(model, cache, kept, padded=padded, watch=check_bound), expected)
        assert cache.next_position == TOTAL

    own = model.config._attn_implementation
    for attention in (own, "eager"):  # sdpa of Gemma 2 leaves the cap of its scores out where there is one
        model.set_attn_implementation(attention)
        plain = cut(prefill(model, DynamicCache(), padded=padded), kept)
        expected = go_on(model, plain, kept, padded=padded, places=places)
        assert expected.argmax(-1).unique().numel() > 8
        check()
    model.set_attn_implementation(own)
    with attach(model, EXACT):
        check()


def test_other_meanings_are_far_from_it(mistral):
    """So the test above tells them apart: nothing dropped, and a window that counts the tokens that came."""
    kept, whole = kept_tokens(), torch.arange(READ).expand(2, -1)
    came = torch.cat([kept, torch.arange(READ, TOTAL).expand(2, -1)], dim=1)
    expected = go_on(mistral, cut(prefill(mistral, DynamicCache()), kept), kept, places=count_left(kept))
    others = [
        go_on(mistral, cut(prefill(mistral, DynamicCache()), kept), kept, places=came),
        go_on(mistral, prefill(mistral, DynamicCache()), whole, places=count_left(whole)),
    ]
    for other in others:
        assert (other - expected).abs().max() > 0.1 * (expected.max() - expected.min())


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "compiled"])
@pytest.mark.parametrize("name", list(MODELS))
def test_quantized_it_reads_what_a_cache_of_all_tokens_reads(name, kernel, monkeypatch):
    model, kept = build(name, std=0.05), kept_tokens()
    whole = evict(prefill(model, KVQ(FIELDS, padding=[PADDING, 0])), kept)
    expected = go_on(model, whole, kept)
    bounded = evict(prefill(model, KVQ(FIELDS, model=model, padding=[PADDING, 0])), kept)
    assert bounded.layers[0].side("key").store.length
    if kernel == "sdpa":
        found = go_on(model, bounded, kept, watch=check_bound)
    else:
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", kernel)
        with attach(model, FIELDS):
            found = go_on(model, bounded, kept, watch=check_bound)
    assert_close(found, expected, 1e-3)  # quantizing itself changes 12e-3 and more
    assert bounded.layers[0].dropped_length
    for ours, theirs in zip(bounded.materialize(0), whole.materialize(0), strict=True):
        assert ours.shape[2] == WINDOW - 1
        if kernel == "sdpa":
            assert torch.equal(ours, theirs[:, :, -WINDOW + 1 :])


def press(module, args, kwargs, output):
    """Drop what a press of kvpress drops: half of the tokens of a prompt, behind the first attention of a layer."""
    del args
    layer = kwargs.get("past_key_values", kwargs.get("cache")).layers[module.layer_idx]
    if layer.keys.shape[2] == READ:
        kept = torch.cat([torch.arange(PADDING), torch.arange(PADDING, READ, 2)])
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    return output


@pytest.mark.case(
    "a press that drops half of the prompt in a model whose layers all slide, and an answer past the window",
    "the tokens are those of a `DynamicCache` without a configuration: the window counts the tokens that are left",
)
@pytest.mark.parametrize("name", ALL_SLIDE)
@pytest.mark.filterwarnings("ignore:the rows of this batch seem to be padded")
def test_a_press_within_one_generate(name):
    """kvpress takes a `DynamicCache` without a configuration; 150 new tokens go past the window."""
    model, (ids, mask) = build(name), text()
    asked = dict(attention_mask=mask[:, :READ], max_new_tokens=150, do_sample=False)
    unpressed = model.generate(ids[:, :READ], past_key_values=DynamicCache(), **asked)
    hooks = [one.self_attn.register_forward_hook(press, with_kwargs=True) for one in model.model.layers]
    expected = model.generate(ids[:, :READ], past_key_values=DynamicCache(), **asked)
    found = model.generate(ids[:, :READ], past_key_values=KVQ(EXACT, model=model), **asked)
    with attach(model, EXACT) as attachment:
        attached = model.generate(ids[:, :READ], **asked)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)
    assert torch.equal(attached, expected)
    assert len(expected[:, READ:].unique()) > 8
    assert not torch.equal(unpressed, expected)
    check_bound(attachment.cache)
    assert attachment.cache.next_position == READ + 149


def filled(model, count, **fields):
    cache = KVQ({**FIELDS, **fields}, model=model)
    states = torch.randn(2, 2, count, 16, generator=torch.Generator().manual_seed(count))
    for layer in range(2):
        cache.update(states, -states, layer)
    return cache, states


@pytest.fixture(scope="module", params=ALL_SLIDE)
def slid_model(request):
    return build(request.param)


def kept_of_window():
    """Return a choice of the window of each row, `[2, 47]`, as places of the prompt."""
    return torch.stack([FIRST + torch.arange(row, WINDOW - 2, 2) for row in range(2)])


def evict_from_window(cache):
    for index in range(len(cache.layers)):
        cache.evict(index, kept_of_window() - FIRST)
    return cache


@torch.inference_mode()
def read_long(model, cache, *, pieces=(LONG,)):
    ids, mask = text()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for start, stop in pairwise((0, *pieces)):
        given = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
        model(ids[:, start:stop], past_key_values=cache, **given)
    return cache


@torch.inference_mode()
def go_on_long(model, cache, *, is_reference=False, watch=lambda cache: None):
    """Return the logits of what follows: the reference holds the kept tokens alone, and its mask is drawn."""
    ids, mask = text()
    positions, held = (mask.cumsum(-1) - 1).clamp_min(0), WINDOW // 2 - 1
    logits = []
    for start, stop in pairwise([LONG, LONG + 9, LONG + 10, LONG + 60, LONG + 61, TOTAL]):
        length = held + stop - LONG
        given = torch.cat([mask[:, :FIRST], mask[:, LONG - held : stop]], dim=1)
        if is_reference:
            given = draw_mask(torch.ones(2, length), torch.arange(length).expand(2, -1), stop - start)
        more = dict(attention_mask=given, position_ids=positions[:, start:stop])
        logits.append(model(ids[:, start:stop], past_key_values=cache, **more).logits)
        watch(cache)
    return torch.cat(logits, dim=1)


@pytest.mark.filterwarnings("ignore:the rows of this batch seem to be padded")
class TestBehindTheWindow:
    """A layer that has slid drops tokens of its window, and what it has forgotten stays so."""

    @pytest.mark.parametrize("pieces", [(LONG,), (90, 150, 151, LONG)])
    def test_exact_states_give_the_logits_of_a_cache_of_the_kept_tokens(self, slid_model, pieces):
        model = slid_model
        plain = cut(read_long(model, DynamicCache(), pieces=pieces), kept_of_window())
        expected = go_on_long(model, plain, is_reference=True)
        for padding in (None, [PADDING, 0]):
            cache = evict_from_window(read_long(model, KVQ(EXACT, model=model, padding=padding), pieces=pieces))
            assert (cache.get_seq_length(), cache.next_position) == (FIRST + WINDOW // 2 - 1, LONG)
            assert cache.layers[0].held_length == WINDOW // 2 - 1
            assert_close(go_on_long(model, cache, watch=check_bound), expected)
            assert cache.next_position == TOTAL
        with attach(model, EXACT):
            cache = evict_from_window(read_long(model, KVQ(EXACT, model=model), pieces=pieces))
            assert_close(go_on_long(model, cache, watch=check_bound), expected)

    @pytest.mark.parametrize("kernel", ["eager", "compiled"])
    def test_each_reader_reads_the_same(self, kernel, monkeypatch):
        model = build("mistral", std=0.05)
        cache = evict_from_window(read_long(model, KVQ(FIELDS, model=model, padding=[PADDING, 0])))
        assert cache.layers[0].side("key").store.length
        exact = evict_from_window(read_long(model, KVQ(EXACT, model=model, padding=[PADDING, 0])))
        held, wanted = cache.materialize(0)[0], exact.materialize(0)[0]
        assert torch.equal(held[:, :, -3:], wanted[:, :, -3:])  # of the 8 newest of the prompt
        assert (held - wanted).norm() < 0.1 * wanted.norm()
        expected = go_on_long(model, cache.fork())
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", kernel)
        with attach(model, FIELDS):
            assert_close(go_on_long(model, cache, watch=check_bound), expected, 1e-3)

    @torch.inference_mode()
    def test_padding_that_the_window_reaches_stays(self, mistral):
        """Of 100 tokens the first 5 are behind the window, of 13 of padding 8 are left."""
        (ids, mask), stop = text(), 100
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        kept = torch.cat([torch.arange(5, PADDING), torch.arange(20, stop)])
        plain, cache = DynamicCache(), KVQ(EXACT, model=mistral, padding=[PADDING, 0])
        for one in (plain, cache):
            given = dict(attention_mask=mask[:, :stop], position_ids=positions[:, :stop])
            mistral(ids[:, :stop], past_key_values=one, **given)
        for index, layer in enumerate(plain.layers):
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
            with pytest.raises(StatesError, match="row 0 begins with 8 tokens of padding"):
                cache.evict(index, torch.arange(7, 95))
            with pytest.raises(StatesError, match="8 tokens of left padding cannot be replaced"):
                cache.layers[index].replace(*(one[:, :, 1:] for one in cache.materialize(index)))
            cache.evict(index, kept - 5)
        length = len(kept) + 40
        left = torch.cat([mask[:, kept], mask[:, stop : stop + 40]], dim=1)
        drawn = draw_mask(left, torch.arange(length).expand(2, -1), 40)
        asked = dict(position_ids=positions[:, stop : stop + 40])
        expected = mistral(ids[:, stop : stop + 40], past_key_values=plain, attention_mask=drawn, **asked).logits
        given = torch.cat([mask[:, :5], left], dim=1)
        assert_close(
            mistral(ids[:, stop : stop + 40], past_key_values=cache, attention_mask=given, **asked).logits, expected
        )

    def test_a_press_on_a_prompt_longer_than_the_window(self, slid_model):
        """Its rows have padding, which is behind the window; the reference goes on by itself, with positions."""
        model, (ids, mask) = slid_model, text()
        asked = dict(attention_mask=mask[:, :LONG], max_new_tokens=90, do_sample=False)
        plain = read_long(model, DynamicCache())
        step = model.generate(ids[:, :LONG], **{**asked, "max_new_tokens": 1})[:, -1:]
        for layer in plain.layers:
            layer.keys, layer.values = layer.keys[:, :, FIRST::2], layer.values[:, :, FIRST::2]
        expected, position = [step], mask[:, :LONG].sum(1, keepdim=True)
        for _ in range(89):
            with torch.inference_mode():
                step = model(step, past_key_values=plain, position_ids=position).logits[:, -1:].argmax(-1)
            expected, position = [*expected, step], position + 1

        def press(module, args, kwargs, output):
            layer = kwargs.get("past_key_values", kwargs.get("cache")).layers[module.layer_idx]
            if kwargs["hidden_states"].shape[1] == LONG:
                layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
            return output

        hooks = [one.self_attn.register_forward_hook(press, with_kwargs=True) for one in model.model.layers]
        cache = KVQ(EXACT, model=model, padding=[PADDING, 0])
        found = model.generate(ids[:, :LONG], past_key_values=cache, **asked)
        with attach(model, EXACT) as attachment:
            attached = model.generate(ids[:, :LONG], **asked)
        for hook in hooks:
            hook.remove()
        assert torch.equal(found[:, LONG:], torch.cat(expected, dim=1))
        assert torch.equal(attached, found)
        assert attachment.cache.next_position == cache.next_position == LONG + 89
        assert len(found[:, LONG:].unique()) > 8

    def test_generate_goes_on(self, slid_model):
        model, (ids, mask) = slid_model, text()
        cache = evict_from_window(read_long(model, KVQ(EXACT, model=model, padding=[PADDING, 0])))
        other, new = cache.fork(), ids[:, LONG : LONG + 5]
        asked = dict(attention_mask=mask[:, : LONG + 5], max_new_tokens=70, do_sample=False)
        found = model.generate(new, past_key_values=cache, **asked)
        positions = mask[:, : LONG + 5].cumsum(-1)[:, -5:] - 1
        step, expected = new, [new]
        for _ in range(70):
            with torch.inference_mode():
                step = model(step, past_key_values=other, position_ids=positions).logits[:, -1:].argmax(-1)
            expected, positions = [*expected, step], positions[:, -1:] + 1
        assert torch.equal(found, torch.cat(expected, dim=1))

    def test_crops_reach_what_came_behind_and_is_held(self, mistral):
        cache = evict_from_window(filled(mistral, LONG, residual_length=4096)[0])
        with pytest.raises(CacheStateError, match="only the newest 0 came"):
            cache.fork().crop(-2)  # the newest that stays in one of the rows
        held = [one.clone() for one in cache.materialize(1)]
        more = torch.randn(2, 2, 30, 16)
        for turns in (1, 2):  # 30 more fit into the window, 60 do not
            for layer in range(2):
                for _ in range(turns):
                    cache.update(more, more, layer)
            if turns == 1:
                cache.crop(-30)
                assert all(torch.equal(*pair) for pair in zip(held, cache.materialize(1), strict=True))
                assert cache.next_position == LONG
        assert cache.layers[0].dropped_length >= FIRST
        assert cache.layers[0].hidden_length == WINDOW // 2 - 1 + 60 - (WINDOW - 1)
        for _ in range(4):
            for layer in range(2):
                cache.update(more, more, layer)
        with pytest.raises(CacheStateError, match="has forgotten what came before them; the newest"):
            cache.crop(-150)
        fork, again = cache.fork(), cache.fork()
        again.reset()
        assert (fork.layers[0].refilled_from, again.layers[0].refilled_from) == (FIRST, 0)

    def test_a_crop_reaches_behind_the_newest_gap(self, mistral):
        cache = evict_from_window(filled(mistral, LONG)[0])
        more = torch.randn(2, 2, 10, 16)
        for layer in range(2):
            cache.update(more, more, layer)
            cache.evict(layer, torch.arange(WINDOW // 2 + 9) != 40)
        with pytest.raises(CacheStateError, match="only the newest 10 came"):
            cache.crop(-11)
        cache.crop(-10)
        assert cache.next_position == LONG

    def test_tokens_before_the_gap_stay(self, mistral):
        """Those held behind the window went, so blocks begin at other tokens."""
        cache = filled(mistral, LONG)[0]
        kept, before = torch.cat([torch.arange(60), torch.arange(70, WINDOW - 1)]), cache.materialize(0)[0]
        cache.evict(0, kept)
        after = cache.materialize(0)[0]
        assert cache.layers[0].held_length == after.shape[2] == len(kept)
        assert (after - before[:, :, kept]).norm() < 0.15 * before.norm()

    def test_it_cannot_be_replaced_by_as_much(self, mistral):
        cache, _ = filled(mistral, LONG)
        keys, values = cache.materialize(0)
        cache.layers[0].keys, cache.layers[0].values = keys, values  # the same: nothing changes
        cache.evict(0, torch.arange(WINDOW - 1))
        assert cache.next_position == cache.get_seq_length() == LONG
        with pytest.raises(CacheStateError, match="95 that the next query sees can be replaced by fewer only"):
            cache.layers[0].keys = keys + 1
        assert torch.equal(cache.materialize(0)[0], keys)

    @pytest.mark.parametrize("change", ["evict", "assign", "replace"])
    def test_chunks_are_not_told_apart_any_more(self, change, tmp_path):
        model = build("llama4")
        changes = {
            "evict": lambda cache: cache.evict(0, torch.arange(4)),
            "assign": lambda cache: setattr(cache.layers[0], "values", cache.materialize(0)[1][:, :, :4]),
            "replace": lambda cache: cache.layers[0].replace(*(one[:, :, :4] for one in cache.materialize(0))),
        }
        cache, _ = filled(model, WINDOW)
        path = tmp_path / "a.safetensors"
        cache.save(path, model=model)
        for one in (cache, cache.fork(), KVQ.load(path, model=model), KVQ.load(path)):
            held = one.materialize(0)
            with pytest.raises(CacheStateError, match="layer 0 attends in chunks of 96 tokens and has passed one"):
                changes[change](one)
            assert all(torch.equal(*pair) for pair in zip(held, one.materialize(0), strict=True))
        changes[change](filled(model, WINDOW - 1)[0])


@torch.inference_mode()
def test_without_a_model_a_longer_prompt_can_be_cut(mistral):
    """As kvpress does it: all tokens are held, and each that is dropped shows one more from behind the window."""
    ids, kept, more = text(padded=False)[0], torch.arange(0, 300, 2), torch.arange(300, TOTAL)[None]
    plain, cache = DynamicCache(), KVQ(EXACT)
    for one in (plain, cache):
        mistral(ids[:, :300], past_key_values=one)
    for index, layer in enumerate(plain.layers):
        cache.evict(index, kept)
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    mask = draw_mask(torch.ones(2, len(kept) + 30), torch.arange(len(kept) + 30).expand(2, -1), 30)
    expected = mistral(ids[:, 300:], past_key_values=plain, position_ids=more, attention_mask=mask).logits
    assert_close(mistral(ids[:, 300:], past_key_values=cache, position_ids=more).logits, expected)


def test_what_was_dropped_makes_room(mistral):
    """The layer slides later by what was dropped, and holds as many tokens as ever."""
    cache, states = filled(mistral, WINDOW - 1, residual_length=4096)
    kept = torch.arange(0, WINDOW - 1, 2)
    evict(cache, kept)
    one = torch.randn(2, 2, 1, 16)
    for count in range(len(kept), WINDOW - 1):
        assert cache.materialize(0)[0].shape[2] == count
        assert torch.equal(cache.materialize(0)[0][:, :, : len(kept)], states[:, :, kept])
        cache.evict(0, torch.arange(count))  # drops nothing, and is still allowed
        for layer in range(2):
            cache.update(one, one, layer)
    assert cache.get_mask_sizes(1, 0) == (WINDOW, 0)
    for layer in range(2):
        cache.update(one, one, layer)
    assert cache.get_mask_sizes(1, 0) == (WINDOW, 1)
    assert torch.equal(cache.materialize(0)[0][:, :, : len(kept) - 1], states[:, :, kept[1:]])
    assert cache.next_position == WINDOW - 1 + (WINDOW - 1 - len(kept)) + 1


def test_copies_crops_and_files_know_of_it(mistral, tmp_path):
    cache, states = filled(mistral, 90)
    snapshot = cache.snapshot()
    evict(cache, torch.cat([torch.arange(20), torch.arange(70, 90)]))
    fork = cache.fork()
    with pytest.raises(CacheStateError, match=r"layers \[0, 1\], and only the newest 20 came"):
        fork.crop(-21)
    fork.crop(-20)
    assert (fork.get_seq_length(), fork.next_position, cache.get_seq_length()) == (20, 70, 40)
    with pytest.raises(CacheStateError, match="evicted from layers"):
        cache.save(tmp_path / "a.safetensors")
    cache.restore(snapshot)
    assert cache.get_seq_length() == cache.next_position == 90
    assert torch.equal(cache.materialize(1)[0][:, :, -16:], states[:, :, -16:])
    fork.reset()
    assert fork.next_position == 0
