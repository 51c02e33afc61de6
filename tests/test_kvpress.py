"""Presses of kvpress, which drop tokens by assigning to the layers of a cache, on a `KVQ`.

kvpress 0.5.5 asks for transformers below 5.3, which gave attention the positions of its tokens as `cache_position`.
Later ones do not, so the tests give them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from kvq import KVQ
from kvq.errors import CacheStateError

kvpress = pytest.importorskip("kvpress")

PRESSES = {
    "knorm": lambda: kvpress.KnormPress(0.5),
    "streaming": lambda: kvpress.StreamingLLMPress(0.4, n_sink=4),
    "snapkv": lambda: kvpress.SnapKVPress(0.5, window_size=16),
    "expected attention": lambda: kvpress.ExpectedAttentionPress(0.5),
    "tova": lambda: kvpress.TOVAPress(0.3),
    "keydiff": lambda: kvpress.KeyDiffPress(0.5),
    "lagkv": lambda: kvpress.LagKVPress(0.5),
    "cur": lambda: kvpress.CURPress(0.5),
    "pyramid": lambda: kvpress.PyramidKVPress(0.5, window_size=16),
    "rotated to new positions": lambda: kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)),
    "chunks": lambda: kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5, window_size=16), chunk_length=20),
}
TOKENS = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_sliding(window: int) -> MistralForCausalLM:
    """Return a model whose layers all slide over `window` tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=window, initializer_range=0.1,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@contextmanager
def positions_given(model: PreTrainedModel, first: int) -> Iterator[None]:
    """Give every attention of the next forwards the positions of its tokens, from `first` on."""

    def give(module, args, kwargs):
        del module
        length = kwargs["hidden_states"].shape[1]
        return args, {"cache_position": torch.arange(first, first + length), **kwargs}

    hooks = [
        layer.self_attn.register_forward_pre_hook(give, with_kwargs=True, prepend=True) for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prefill(model: PreTrainedModel, press, cache) -> None:
    tokens = torch.randint(0, 300, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), positions_given(model, 0), press(model):
        model(tokens, past_key_values=cache)


def go_on(model: PreTrainedModel, cache) -> torch.Tensor:
    """Return the logits of 24 more tokens, one at a time: layers may hold unequally many."""
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return torch.cat([
            model(tokens[:, place, None], past_key_values=cache, position_ids=torch.tensor([[TOKENS + place]])).logits
            for place in range(24)
        ], dim=1)  # fmt: skip


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
@pytest.mark.parametrize("attention", ["sdpa", "kvq"])
def test_a_press_leaves_in_a_kvq_what_it_leaves_in_dynamic_cache(model, make, attention):
    """While the window holds all tokens, to the bit; and the model goes on alike."""
    plain = DynamicCache(config=model.config)
    prefill(model, make(), plain)
    expected = go_on(model, plain)
    model.set_attn_implementation(attention)
    cache = KVQ(model=model, backend="native", residual_length=4096)
    prefill(model, make(), cache)
    found = go_on(model, cache)
    model.set_attn_implementation("sdpa")
    lengths = [layer.keys.shape[2] for layer in plain.layers]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    assert cache.next_position == TOKENS + 24
    for index, layer in enumerate(plain.layers):
        for states, held in zip(cache.materialize(index), (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(states, held, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
def test_a_press_on_layers_that_slide(make):
    """kvpress's pipeline makes a `DynamicCache` without a configuration, whose masks count the tokens that are left."""
    sliding_model = build_sliding(TOKENS + 24)
    plain, cache = DynamicCache(), KVQ(model=sliding_model, backend="native", residual_length=4096)
    assert all(layer.is_sliding for layer in cache.layers)
    for one in (plain, cache):
        prefill(sliding_model, make(), one)
    lengths = [layer.keys.shape[2] for layer in plain.layers]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    torch.testing.assert_close(go_on(sliding_model, cache), go_on(sliding_model, plain), rtol=1e-3, atol=1e-3)
    assert cache.next_position == TOKENS + 24


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
def test_a_press_behind_the_window(make):
    """It sees what transformers' own layers hold then. Their masks fit no longer; a cache of these states goes on."""
    model = build_sliding(200)
    own, kept = DynamicCache(config=model.config), DynamicCache()
    cache = KVQ(model=model, backend="native", residual_length=4096)
    for one in (own, cache):
        prefill(model, make(), one)
    for index, layer in enumerate(own.layers):
        kept.update(layer.keys, layer.values, index)
        for states, held in zip(cache.materialize(index), (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(states, held, rtol=1e-4, atol=1e-4)
    assert cache.next_position == TOKENS
    if len({layer.keys.shape[2] for layer in own.layers}) == 1:  # else no mask fits all layers once the first slides
        torch.testing.assert_close(go_on(model, cache), go_on(model, kept), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
def test_a_quantized_cache_shrinks_by_a_press_and_goes_on(model, make):
    plain = DynamicCache(config=model.config)
    prefill(model, make(), plain)
    cache = KVQ(model=model, backend="native", nbits_k=8, nbits_v=8, residual_length=32)
    whole = KVQ(model=model, backend="native", nbits_k=8, nbits_v=8, residual_length=32)
    prefill(model, make(), cache)
    with torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.int64), past_key_values=whole)
    lengths = [layer.keys.shape[2] for layer in plain.layers]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    if max(lengths) < TOKENS:
        assert cache.memory().packed_bytes < whole.memory().packed_bytes
    expected, found = go_on(model, plain), go_on(model, cache)
    assert (found - expected).norm() < 0.35 * expected.norm()  # 0.0x where the same tokens stay; scores tie
    assert all(layer.side("key").store.length for layer in cache.layers if layer.get_seq_length() > 100)


def test_a_press_during_decoding_keeps_the_cache_short(model):
    press = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=16, target_size=128)
    cache = KVQ(model=model, backend="native", nbits_k=8, nbits_v=8, residual_length=32)
    tokens = torch.randint(0, 300, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with press(model):
            for place in range(TOKENS, TOKENS + 40):
                with positions_given(model, place):
                    model(torch.tensor([[place % 300]]), past_key_values=cache, position_ids=torch.tensor([[place]]))
    assert 128 <= cache.get_seq_length() < 128 + 16 + 1
    assert cache.next_position == TOKENS + 40


def test_head_wise_masks_work_where_attention_reads_plain_states(model):
    """AdaKV drops nothing: it overwrites keys that attention is given, which a handle refuses."""
    plain, cache = DynamicCache(config=model.config), KVQ(model=model, backend="native", residual_length=4096)
    found = []
    for one in (plain, cache):
        prefill(model, kvpress.AdaKVPress(kvpress.KnormPress(0.5)), one)
        found.append(go_on(model, one))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    model.set_attn_implementation("kvq")
    with pytest.raises(CacheStateError):
        go_on(model, cache)
    model.set_attn_implementation("sdpa")
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


def test_a_press_that_writes_into_the_keys_is_told_what_to_do(model):
    cache = KVQ(model=model, backend="native")
    with pytest.raises(CacheStateError, match=r"scatter_ writes to the keys of layer 0.*evict and assignment"):
        prefill(model, kvpress.ThinKPress(key_channel_compression_ratio=0.25, window_size=16), cache)
