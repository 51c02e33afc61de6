"""Where features meet: sliding layers under crops and in files, gradients and plans of the packed attention."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from kvq import KVQ
from kvq.attention import ATTENTION_NAME
from kvq.attention.handle import PackedStates
from kvq.errors import CacheStateError, StatesError

WINDOW = 16


@pytest.fixture
def config():
    return Qwen2Config(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=WINDOW,
        attn_implementation=ATTENTION_NAME,
    )


def feed(cache, tokens, seed=0):
    states = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))
    return [cache.update(states, -states, layer) for layer in range(2)]


def lengths(cache):
    return [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize(("removed", "error"), [(-5, CacheStateError), (5, StatesError)])
def test_a_refused_crop_leaves_all_layers_as_they_are(config, removed, error):
    cache = KVQ(model=config)
    feed(cache, 40)
    with pytest.raises(error):
        cache.crop(removed)
    assert lengths(cache) == [40, 40]


def test_a_sliding_layer_that_records_is_saved_as_one_that_goes_on(config, tmp_path):
    cache = KVQ(model=config, residual_length=8)
    cache.activate_past_recording()
    feed(cache, 100)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors", model=config)
    assert loaded.layers[1].keys.shape[2] == WINDOW - 1
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys[:, :, -(WINDOW - 1) :])
    assert loaded.get_mask_sizes(1, 1) == (WINDOW, 100 - WINDOW + 1)
    (_, (keys, _)) = feed(loaded, 1, seed=1)
    assert keys.shape[2] == WINDOW
    assert lengths(loaded) == [101, 101]


def test_states_that_gradients_flow_to_come_back_as_tensors(config):
    states = torch.randn(1, 2, 300, 32)
    assert isinstance(KVQ(model=config).update(states, states, 0)[0], PackedStates)
    wanted = states.clone().requires_grad_()
    keys, values = KVQ(model=config).update(wanted, wanted * 2, 0)
    assert not isinstance(keys, PackedStates)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(wanted.grad, torch.full_like(wanted, 3))
    with torch.no_grad():
        assert isinstance(KVQ(model=config).update(wanted, wanted, 0)[0], PackedStates)


@pytest.mark.parametrize("change", [lambda layer: layer.crop(-250), lambda layer: layer.batch_repeat_interleave(2)])
def test_no_plan_keeps_chunks_alive_that_the_layer_has_left(config, change):
    cache = KVQ(model=config)
    feed(cache, 300)
    layer = cache.layers[0]
    layer.kernel_cache.kernel_data["a kernel"] = layer.side("key").view().store.segments
    change(layer)
    assert layer.kernel_cache.kernel_data == {}
