"""Dropping tokens of a layer: what stays, what is quantized again, and how a model goes on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvq import KVQ, attach
from kvq.errors import CacheStateError, StatesError

EXACT = {"backend": "native", "residual_length": 4096}
SMALL = {"backend": "native", "residual_length": 16, "sink_length": 2}
TOKENS = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def draw(tokens: int = TOKENS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, tokens, 64, generator=generator).unbind(0)
    return keys * torch.linspace(0.2, 3, 64), values


def filled(**fields) -> KVQ:
    cache = KVQ(**{**SMALL, **fields})
    cache.update(*draw(), 0)
    return cache


def choose(seed: int, count: int = 200) -> torch.Tensor:
    return torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def gathered(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gather row by row and head by head, with plain indexing."""
    return torch.stack(
        [
            torch.stack([states[row, head, kept[row, head]] for head in range(states.shape[1])])
            for row in range(states.shape[0])
        ]
    )


KEPT = {
    "one list": choose(1).expand(2, 2, -1),
    "by row": torch.stack([choose(1), choose(2)])[:, None].expand(2, 2, -1),
    "by head": torch.stack([torch.stack([choose(1), choose(2)]), torch.stack([choose(3), choose(4)])]),
}


class TestWhatStays:
    @pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
    @pytest.mark.parametrize("as_mask", [False, True])
    def test_it_is_what_indexing_gives(self, kept, as_mask):
        cache = filled(**EXACT)
        keep = torch.zeros(2, 2, TOKENS, dtype=torch.bool).scatter(2, kept, True) if as_mask else kept
        cache.evict(0, keep)
        for found, given in zip(cache.materialize(0), draw(), strict=True):
            assert torch.equal(found, gathered(given, kept))

    def test_shorter_shapes_mean_all_heads_or_all_rows(self):
        for keep in (choose(1), choose(1)[None], choose(1).flip(0), torch.isin(torch.arange(TOKENS), choose(1))):
            cache = filled(**EXACT)
            cache.evict(0, keep)
            assert torch.equal(cache.materialize(0)[0], draw()[0][:, :, choose(1)])

    def test_two_dimensions_are_rows(self):
        cache, kept = filled(**EXACT), torch.stack([choose(1), choose(2)])
        cache.evict(0, kept)
        assert torch.equal(cache.materialize(0)[0], gathered(draw()[0], KEPT["by row"]))

    def test_blocks_before_the_first_gap_stay_bit_for_bit(self):
        cache = filled()
        before = [
            {name: part.clone() for name, part in segment.read(0, 2).items()}
            for segment in [cache.layers[0].side("key").store.segments[0]]
        ]
        cache.evict(0, torch.cat([torch.arange(130), torch.arange(150, TOKENS)]))
        found = cache.layers[0].side("key").store.segments[0]
        assert all(torch.equal(part, found.read(0, 2)[name]) for name, part in before[0].items())
        assert cache.layers[0].side("key").store.length == 256

    def test_the_newest_and_the_sinks_stay_exact(self):
        cache, (keys, values) = filled(), draw()
        kept = torch.arange(0, TOKENS, 2)
        newest = TOKENS - 256  # of 300 tokens with a window of 16, four blocks are stored
        cache.evict(0, torch.cat([kept[kept < 256], torch.arange(256, TOKENS)]))
        for found, given in zip(cache.materialize(0), (keys, values), strict=True):
            assert torch.equal(found[:, :, -newest:], given[:, :, -newest:])
            assert torch.equal(found[:, :, :2], given[:, :, [0, 2]][:, :, :2]) is False  # token 2 was no sink
            assert torch.equal(found[:, :, :1], given[:, :, :1])

    def test_nothing_may_stay(self):
        cache = filled()
        cache.evict(0, torch.arange(0))
        assert (cache.get_seq_length(), cache.next_position) == (0, TOKENS)
        cache.update(*draw(20, seed=3), 0)
        assert torch.equal(cache.materialize(0)[0], draw(20, seed=3)[0])

    def test_memory_shrinks_with_the_tokens(self):
        cache, fresh = filled(), KVQ(**SMALL)
        before = cache.memory().total_bytes
        cache.evict(0, torch.arange(0, TOKENS, 2))
        fresh.update(*(states[:, :, ::2] for states in draw()), 0)
        assert cache.memory().total_bytes <= fresh.memory().total_bytes < before
        assert cache.memory().full_precision_bytes == fresh.memory().full_precision_bytes


class TestError:
    @staticmethod
    def _after(evictions: int, **fields) -> float:
        """Return the relative error of the same 140 tokens after they were reached in so many evictions."""
        cache = filled(sink_length=0, **fields)
        order = torch.arange(TOKENS - 40)[choose(5, count=160) % (TOKENS - 40)].unique()[:120]
        alive = torch.arange(TOKENS)
        for gone in order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))].chunk(evictions):
            keep = ~torch.isin(alive, gone)
            cache.evict(0, keep)
            alive = alive[keep]
        expected = draw()[0][:, :, alive]
        return ((cache.materialize(0)[0] - expected).norm() / expected.norm()).item()

    def test_groups_along_a_token_find_their_codes_again(self):
        fields = dict(nbits_k=4, nbits_v=4, axis_key="per_token", axis_value="per_token")
        once, often = self._after(1, **fields), self._after(8, **fields)
        assert often < 1.02 * once

    def test_groups_along_a_channel_add_error_with_each_eviction(self):
        once, often = self._after(1, nbits_k=4), self._after(8, nbits_k=4)
        assert 1.3 * once < often < 4 * once

    @pytest.mark.parametrize(("axis", "warns"), [("per_channel", True), ("per_token", False)])
    def test_the_second_eviction_warns_where_error_grows(self, monkeypatch, axis, warns):
        monkeypatch.setattr("kvq.user_warnings._told", set())
        cache = filled(axis_key=axis, axis_value=axis)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache.evict(0, torch.arange(10, TOKENS))
            assert not caught
            cache.evict(0, torch.arange(10, TOKENS - 10))
        assert ["for a second time" in str(one.message) for one in caught] == [True] * warns

    def test_an_eviction_of_nothing_changes_nothing(self):
        cache = filled()
        before = cache.materialize(0)
        cache.evict(0, torch.ones(TOKENS, dtype=torch.bool))
        assert all(torch.equal(one, other) for one, other in zip(cache.materialize(0), before, strict=True))


class TestAssignment:
    @pytest.mark.parametrize("sides", [("keys", "values"), ("values", "keys")])
    def test_both_sides_assigned_is_an_eviction(self, sides):
        cache, other, layer = filled(), filled(), 0
        kept = choose(2)
        for side in sides:
            setattr(cache.layers[layer], side, getattr(cache.layers[layer], side)[:, :, kept])
        other.evict(layer, kept)
        assert cache.get_seq_length() == 200
        for one, two in zip(cache.materialize(0), other.materialize(0), strict=True):
            assert torch.equal(one, two)
        assert cache.next_position == TOKENS

    def test_a_cut_at_the_end_leaves_the_store_as_a_crop_does(self):
        cache, other = filled(), filled()
        for side in ("keys", "values"):
            setattr(cache.layers[0], side, getattr(cache.layers[0], side)[:, :, :280])
        other.crop(-20)
        for name, side in cache.layers[0].sides():
            assert side.store.length == other.layers[0].side(name).store.length == 256
        assert all(torch.equal(*pair) for pair in zip(cache.materialize(0), other.materialize(0), strict=True))

    def test_other_keys_of_the_same_length_are_taken_at_once(self):
        cache = filled(**EXACT)
        cache.layers[0].keys = draw(seed=9)[0]
        assert torch.equal(cache.materialize(0)[0], draw(seed=9)[0])
        assert torch.equal(cache.materialize(0)[1], draw()[1])

    def test_half_an_assignment_stops_everything_else(self, tmp_path):
        cache = filled()
        layer = cache.layers[0]
        layer.keys = layer.keys[:, :, :100]
        assert layer.keys.shape[2] == 100
        for use in (
            lambda: cache.update(*draw(1), 0),
            lambda: cache.materialize(0),
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.save(tmp_path / "a.safetensors"),
        ):
            with pytest.raises(CacheStateError, match=r"keys of layer 0 were assigned with 100 tokens.*still has 300"):
                use()
        layer.values = layer.values[:, :, :100]
        cache.update(*draw(1), 0)
        assert cache.get_seq_length() == 101

    @pytest.mark.parametrize(
        ("states", "said"),
        [
            (torch.zeros(2, 2, 5, 32), "head_dim 32"),
            (torch.zeros(2, 3, 5, 64), "heads 3"),
            (torch.zeros(3, 2, 5, 64), "batch size 3"),
            (torch.zeros(2, 2, 5, 64, dtype=torch.float16), "dtype"),
            (torch.zeros(5, 64), "shape"),
            (None, "NoneType"),
        ],
    )
    def test_states_that_do_not_fit_are_refused(self, states, said):
        cache = filled()
        with pytest.raises(StatesError, match=said):
            cache.layers[0].keys = states
        assert cache.get_seq_length() == TOKENS
        cache.update(*draw(1), 0)

    def test_before_the_first_update_there_is_nothing_to_assign_to(self, model):
        with pytest.raises(CacheStateError, match="before the model has run"):
            KVQ(model=model, **SMALL).layers[0].keys = draw()[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("keep", "said"),
        [
            (torch.tensor([0, 300]), "from 0 to 300; there are 300"),
            (torch.tensor([-1, 3]), "from -1 to 3"),
            (torch.tensor([3, 3]), "a token twice"),
            (torch.tensor([0.5]), "float32"),
            ([0, 1], "list"),
            (torch.ones(299, dtype=torch.bool), "for 299 tokens; there are 300"),
            (torch.tensor([[True] * 300, [True] * 299 + [False]]), "keeps 299 to 300 tokens"),
            (torch.zeros(3, 4, dtype=torch.int64), r"has shape \[3, 4\]"),
            (torch.zeros(1, 1, 1, 1, dtype=torch.int64), "has shape"),
            (torch.tensor(3), "has shape"),
        ],
    )
    def test_a_keep_that_does_not_fit_changes_nothing(self, keep, said):
        cache = filled()
        before = cache.materialize(0)
        with pytest.raises(StatesError, match=said):
            cache.evict(0, keep)
        assert all(torch.equal(*pair) for pair in zip(cache.materialize(0), before, strict=True))

    def test_padding_stays(self):
        cache = KVQ(padding=(70, 0), **SMALL)
        cache.update(*draw(), 0)
        with pytest.raises(StatesError, match="row 0 begins with 70 tokens of padding, which keep must name too"):
            cache.evict(0, torch.arange(60, TOKENS))
        with pytest.raises(StatesError, match="70 tokens of left padding cannot be replaced"):
            cache.layers[0].keys = draw(seed=8)[0]
        cache.evict(0, torch.cat([torch.arange(72), torch.arange(100, TOKENS)]))
        assert torch.equal(cache.materialize(0)[0][0, :, 70:72], draw()[0][0, :, 70:72])  # its sinks

    def test_layers_that_kvq_does_not_hold(self, model):
        cache = KVQ(model=model, layers={"1": {"full_precision": True}}, **SMALL)
        for index, said in ((0, "holds no tokens yet"), (1, "is a DynamicLayer"), (7, "does not exist")):
            with pytest.raises(CacheStateError, match=f"layer {index} {said}"):
                cache.evict(index, torch.arange(3))

    def test_what_no_longer_holds_all_tokens_is_not_saved(self, tmp_path):
        cache = filled()
        cache.token_ids = torch.zeros(2, TOKENS, dtype=torch.int64)
        cache.evict(0, torch.arange(100))
        with pytest.raises(CacheStateError, match=r"evicted from layers \[0\].*save the cache before"):
            cache.save(tmp_path / "a.safetensors")
        assert cache.token_ids is None
        with pytest.raises(CacheStateError, match="does not know the tokens"):
            cache.crop_to_prefix(torch.zeros(2, 10, dtype=torch.int64))


class TestCrop:
    """A crop takes back tokens that came last; evicted ones would have to be counted among them."""

    @pytest.mark.parametrize(
        ("keeps", "newest"),
        [
            ([torch.cat([torch.arange(4), torch.arange(250, TOKENS)])], 50),
            ([torch.arange(100)], 0),
            ([torch.cat([torch.arange(4), torch.arange(250, TOKENS)]), torch.arange(54) != 2], 50),
            ([torch.cat([torch.arange(4), torch.arange(250, TOKENS)]), torch.arange(54) != 20], 33),
            ([torch.arange(TOKENS) != 298, torch.arange(299) != 2], 1),
        ],
    )
    def test_it_reaches_to_the_newest_gap(self, keeps, newest):
        cache = filled()
        for keep in keeps:
            cache.evict(0, keep)
        fork, held = cache.fork(), cache.get_seq_length()
        for one in (cache, fork):
            with pytest.raises(CacheStateError, match=rf"layers \[0\], and only the newest {newest} came"):
                one.crop(-newest - 1)
            assert one.get_seq_length() == held
            one.crop(-newest)
            assert one.get_seq_length() == held - newest
            assert one.next_position == TOKENS - newest
            one.update(*draw(3), 0)
            one.crop(-3)
            assert one.next_position == TOKENS - newest

    def test_after_a_reset_it_reaches_all(self):
        cache = filled()
        cache.evict(0, torch.arange(100))
        cache.reset()
        cache.update(*draw(), 0)
        cache.crop(-TOKENS)
        assert cache.get_seq_length() == cache.next_position == 0


def test_copies_are_independent_and_a_reset_forgets():
    cache = filled()
    fork, copied = cache.fork(), copy.deepcopy(cache)
    cache.evict(0, torch.arange(50))
    assert (fork.get_seq_length(), copied.get_seq_length(), cache.get_seq_length()) == (300, 300, 50)
    again = cache.fork()
    again.update(*draw(2), 0)
    assert (again.next_position, cache.next_position) == (302, 300)
    again.crop(-2)
    assert (again.get_seq_length(), again.next_position) == (50, 300)
    cache.reset()
    assert cache.next_position == 0


class TestGoingOn:
    """The model goes on from what is left as it does from a `DynamicCache` that was cut in the same way."""

    @staticmethod
    def _prefilled(model, tokens, **fields):
        plain, cache = DynamicCache(config=model.config), KVQ(model=model, **fields)
        with torch.inference_mode():
            model(tokens, past_key_values=plain)
            model(tokens, past_key_values=cache)
        return plain, cache

    @staticmethod
    def _drop(plain, cache, kept):
        for index, layer in enumerate(plain.layers):
            cache.evict(index, kept[index])
            layer.keys, layer.values = layer.keys[:, :, kept[index]], layer.values[:, :, kept[index]]

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "kvq"])
    def test_with_positions_logits_are_those_of_dynamic_cache(self, model, attention):
        tokens = torch.randint(0, 300, (2, 240), generator=torch.Generator().manual_seed(4))
        plain, cache = self._prefilled(model, tokens[:, :200], **EXACT)
        self._drop(plain, cache, [torch.arange(3, 200, 2)] * 3)
        assert (cache.get_seq_length(), cache.next_position) == (99, 200)
        with torch.inference_mode():
            expected = model(tokens[:, 200:], past_key_values=plain, position_ids=torch.arange(200, 240)[None]).logits
            model.set_attn_implementation(attention)
            positions = torch.arange(cache.next_position, 240)[None]
            found = model(tokens[:, 200:], past_key_values=cache, position_ids=positions).logits
            wrong = model(tokens[:, 239:], past_key_values=cache.fork()).logits  # as if 139 tokens had come
            right = model(tokens[:, 239:], past_key_values=cache, position_ids=torch.tensor([[240]])).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (wrong - right).abs().max() > 0.1

    @pytest.mark.parametrize("attention", ["sdpa", "kvq"])
    def test_layers_of_unequal_lengths_go_on_token_by_token(self, model, attention):
        tokens = torch.randint(0, 300, (1, 220), generator=torch.Generator().manual_seed(4))
        plain, cache = self._prefilled(model, tokens[:, :200], **EXACT)
        self._drop(plain, cache, [torch.arange(0, 200, 2), torch.arange(0, 200, 3), torch.arange(20, 200)])
        for place in range(200, 220):
            step, positions = tokens[:, place : place + 1], torch.tensor([[place]])
            with torch.inference_mode():
                expected = model(step, past_key_values=plain, position_ids=positions).logits
                model.set_attn_implementation(attention)
                found = model(step, past_key_values=cache, position_ids=positions).logits
                model.set_attn_implementation("sdpa")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_quantized_states_stay_near(self, model):
        tokens = torch.randint(0, 300, (2, 340), generator=torch.Generator().manual_seed(4))
        positions = torch.arange(300, 340)[None]

        def measure(kept):
            plain, cache = self._prefilled(model, tokens[:, :300], nbits_k=8, nbits_v=8, **SMALL)
            if kept is not None:
                self._drop(plain, cache, [kept] * 3)
            assert cache.layers[0].side("key").store.length == (256 if kept is None else 128)
            with torch.inference_mode():
                expected = model(tokens[:, 300:], past_key_values=plain, position_ids=positions).logits
                found = model(tokens[:, 300:], past_key_values=cache, position_ids=positions).logits
            return ((found - expected).norm() / expected.norm()).item()

        assert measure(torch.arange(1, 300, 2)) < 2.5 * measure(None) < 0.25

    def test_within_one_generate_nothing_else_is_needed(self, model):
        """As with a press of kvpress: a hook drops tokens at the end of each layer's first attention."""
        tokens = torch.randint(3, 300, (2, 200), generator=torch.Generator().manual_seed(6))
        options = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)

        def press(module, args, kwargs, output):
            del args
            layer = kwargs.get("past_key_values", kwargs.get("cache")).layers[module.layer_idx]
            if layer.keys.shape[2] == 200:
                layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
            return output

        hooks = [one.self_attn.register_forward_hook(press, with_kwargs=True) for one in model.model.layers]
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        with attach(model, **EXACT) as attachment:
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        for hook in hooks:
            hook.remove()
        assert attachment.cache.get_seq_length() == 129
        assert torch.equal(found, expected)
        assert len(found[0, 200:].unique()) >= 8
        assert not torch.equal(found, model.generate(tokens, attention_mask=torch.ones_like(tokens), **options))
