"""A prefix that full precision has read once, against caches that read it themselves."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ
from kvq.attention.hint import without_hint
from kvq.evaluation.quality import prefix as prefix_module
from kvq.evaluation.quality.candidates import list_peers
from kvq.evaluation.quality.forcing import read_on
from kvq.evaluation.quality.prefix import Prefix


def count_forwards(model):
    counted = []
    handle = model.register_forward_pre_hook(lambda *_: counted.append(1))
    return counted, handle


@pytest.fixture
def build_ours(loaded):
    return lambda: KVQ(model=loaded[0], nbits_v=2, residual_length=20)


def test_a_cache_holds_what_it_would_have_read(loaded, text, build_ours):
    model, tokens = loaded[0], text.sequences[:2]
    given, own = build_ours(), build_ours()
    prefix = Prefix(model, tokens[:, :300])
    counted, handle = count_forwards(model)
    prefix.give_to(given)
    handle.remove()
    assert counted == []
    with without_hint(), torch.inference_mode():
        model(tokens[:, :300], past_key_values=own)
        for layer in range(len(own.layers)):
            for ours, theirs in zip(given.materialize(layer), own.materialize(layer), strict=True):
                assert torch.equal(ours, theirs)
        assert given.memory().total_bytes == own.memory().total_bytes
        assert torch.equal(read_on(model, tokens[:, 300:310], given), read_on(model, tokens[:, 300:310], own))


@pytest.mark.parametrize("library", ["hqq", pytest.param("quanto", marks=pytest.mark.costly)])
def test_a_peer_holds_what_it_would_have_read(loaded, text, library):
    model, tokens = loaded[0], text.sequences[:1]
    peer = next(peer for peer in list_peers() if peer.label == f"transformers {library} 4")
    given, own = peer.build(model), peer.build(model)
    prefix = Prefix(model, tokens[:, :300])
    prefix.give_to(given)
    with torch.inference_mode():
        model(tokens[:, :300], past_key_values=own)
    assert torch.equal(read_on(model, tokens[:, 300:301], given), read_on(model, tokens[:, 300:301], own))


def test_full_precision_reads_on_and_others_keep_the_prefix(loaded, text, build_ours):
    tokens = text.sequences[:1]
    prefix, given = Prefix(loaded[0], tokens[:, :100]), build_ours()
    prefix.give_to(given)
    read_on(loaded[0], tokens[:, 100:150], prefix.cache)
    assert (prefix.cache.get_seq_length(), given.get_seq_length()) == (150, 100)


def test_a_long_prefix_is_read_in_chunks(loaded, text, monkeypatch):
    model, tokens = loaded[0], text.sequences[:2]
    whole = Prefix(model, tokens)
    monkeypatch.setattr(prefix_module, "CHUNK", 64)
    counted, handle = count_forwards(model)
    chunked = Prefix(model, tokens)
    handle.remove()
    assert len(counted) == 7  # 400 tokens
    assert chunked.cache.get_seq_length() == 400
    assert (chunked.logits - whole.logits).abs().max() < 1e-3 * whole.logits.abs().max()


def build_model(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
SLIDING = {
    "all layers": transformers.MistralConfig(sliding_window=24, num_hidden_layers=2, vocab_size=99, **SHAPE),
    "some layers": transformers.Gemma3TextConfig(
        sliding_window=24,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        vocab_size=99,
        **SHAPE,
    ),
}
CACHES = {
    "full precision": lambda model: DynamicCache(config=model.config),
    "sliding layers kept": lambda model: KVQ(model=model, nbits_v=2, residual_length=16, q_group_size=32),
    "quantized": lambda model: KVQ(model=model, nbits_v=2, residual_length=16, q_group_size=32, sliding="quantize"),
}


@pytest.mark.parametrize("build", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("config", SLIDING.values(), ids=SLIDING)
@pytest.mark.parametrize("chunk", [1024, 40])
def test_a_model_whose_layers_slide_is_read_once_in_chunks(config, build, chunk, monkeypatch):
    """Chunks are longer than the window, so no layer of full precision holds all that it was given."""
    monkeypatch.setattr(prefix_module, "CHUNK", chunk)
    model = build_model(config)
    tokens = torch.randint(99, (2, 200), generator=torch.Generator().manual_seed(0))
    given, own = build(model), build(model)
    lengths = []
    handle = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    prefix = Prefix(model, tokens[:, :150])
    prefix.give_to(given)
    handle.remove()
    assert lengths == ([150] if chunk > 150 else [40, 40, 40, 30])
    with without_hint(), torch.inference_mode():
        model(tokens[:, :150], past_key_values=own)
    assert given.get_seq_length() == own.get_seq_length() == 150
    for piece in tokens[:, 150:].split(10, dim=1):
        found, expected = read_on(model, piece, given), read_on(model, piece, own)
        if chunk > 150:
            assert torch.equal(found, expected)
        else:  # 0.02 where the cache reads the chunks itself, 0.01 where it is given what a window has left
            assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


def test_what_slid_away_is_not_kept_for_good(monkeypatch):
    model = build_model(SLIDING["some layers"])
    prefix = Prefix(model, torch.zeros(1, 100, dtype=torch.long))
    prefix.forget()
    with pytest.raises(KeyError):
        prefix.give_to(DynamicCache(config=model.config))
    held = [layer.keys.shape[2] for layer in prefix.cache.layers]
    assert held == [23, 100, 23]


def test_a_model_that_carries_sums_reads_again():
    config = transformers.Lfm2Config(
        layer_types=["conv", "full_attention"], num_hidden_layers=2, vocab_size=99, block_ff_dim=96, **SHAPE
    )
    model = build_model(config)
    tokens = torch.randint(99, (2, 200), generator=torch.Generator().manual_seed(0))
    prefix, given, own = Prefix(model, tokens[:, :150]), *(KVQ(model=model, residual_length=16) for _ in range(2))
    counted, handle = count_forwards(model)
    prefix.give_to(given)
    handle.remove()
    assert len(counted) == 1
    with without_hint(), torch.inference_mode():
        model(tokens[:, :150], past_key_values=own)
    assert torch.equal(read_on(model, tokens[:, 150:], given), read_on(model, tokens[:, 150:], own))
