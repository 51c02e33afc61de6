"""The handles that `update` returns under the "kvq" attention."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from kvq import KVQ
from kvq.attention.entry import kvq_attention_forward
from kvq.attention.handle import PackedStates
from kvq.config import KVQCacheConfig
from kvq.errors import CacheStateError
from kvq.layers.quantized_layer import KVQLayer


@pytest.fixture
def layer():
    layer = KVQLayer(0, KVQCacheConfig().for_layer(0))
    layer.update(torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64))
    return layer


@pytest.fixture
def handles(layer):
    return layer.update(torch.randn(2, 2, 3, 64), torch.randn(2, 2, 3, 64), packed=True)


def test_a_handle_has_the_shape_of_the_states_and_no_storage(layer, handles):
    for handle in handles:
        assert isinstance(handle, PackedStates)
        assert handle.shape == (2, 2, 303, 64)
        assert handle.dtype == torch.float32
        with pytest.raises(CacheStateError, match="no storage"):
            handle.data_ptr()
        with pytest.raises(CacheStateError, match="no storage"):
            handle.share_memory_()


def test_any_operation_sees_what_the_layer_holds(layer, handles):
    keys, values = handles
    assert torch.equal(keys + 0, layer.keys)
    assert torch.equal(values[:, :, 5:9], layer.values[:, :, 5:9])
    query = torch.randn(2, 2, 1, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, keys, values), expected)
    assert torch.equal(torch.cat([keys, keys]), torch.cat([layer.keys, layer.keys]))
    assert torch.equal(keys.repeat_interleave(2, dim=1), layer.keys.repeat_interleave(2, dim=1))


def test_writing_to_what_a_handle_gives_does_not_reach_the_layer(layer, handles):
    before = layer.keys
    handles[0].materialize().zero_()
    (handles[0] * 1).zero_()
    assert torch.equal(layer.keys, before)


def test_copies_are_plain(layer, handles):
    for copied in (copy.deepcopy(handles[0]), pickle.loads(pickle.dumps(handles[0]))):  # noqa: S301  # our own bytes
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, layer.keys)


@pytest.mark.parametrize("change", ["update", "crop", "reorder", "reset"])
def test_a_stale_handle_is_refused(layer, handles, change):
    {
        "update": lambda: layer.update(torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)),
        "crop": lambda: layer.crop(-1),
        "reorder": lambda: layer.reorder_cache(torch.tensor([1, 0])),
        "reset": layer.reset,
    }[change]()
    with pytest.raises(CacheStateError, match="after the cache changed"):
        handles[0] + 0


def test_handles_of_a_layer_that_records_its_past_outlive_changes(layer):
    layer.activate_past_recording()
    handles = layer.update(torch.randn(2, 2, 30, 64), torch.randn(2, 2, 30, 64), packed=True)
    before = [handle.materialize() for handle in handles]
    layer.crop(-20)
    layer.update(torch.randn(2, 2, 90, 64), torch.randn(2, 2, 90, 64), packed=True)
    layer.crop(0)
    for handle, states in zip(handles, before, strict=True):
        assert not handle.is_fresh
        assert torch.equal(handle.materialize(), states)


def test_attention_reads_a_handle_that_outlives_a_change_without_a_kernel(layer):
    layer.activate_past_recording()
    module, query = SimpleNamespace(is_causal=True), torch.randn(2, 2, 1, 64)
    keys, values = layer.update(torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64), packed=True)
    before = keys.materialize(), values.materialize()
    layer.crop(-200)
    expected, _ = kvq_attention_forward(module, query, *before, None, scaling=0.125)
    layer.kernel_cache.last_reader = ""
    found, _ = kvq_attention_forward(module, query, keys, values, None, scaling=0.125)
    assert torch.equal(found, expected)
    assert layer.kernel_cache.last_reader == "", "a kernel would keep where the chunks were"


def test_handles_of_two_layers_are_not_taken_for_a_pair(layer):
    other = KVQLayer(1, KVQCacheConfig().for_layer(1))
    one = layer.update(torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64), packed=True)
    two = other.update(torch.randn(2, 2, 301, 64), torch.randn(2, 2, 301, 64), packed=True)
    assert one[0].pair is one[1].pair
    assert one[0].pair is not two[1].pair


def test_writing_to_a_handle_is_refused(handles):
    with pytest.raises(CacheStateError, match="writes to keys or values"):
        handles[0].mul_(2)
    with pytest.raises(CacheStateError, match="writes to keys or values"):
        torch.add(handles[1], 1, out=handles[1])


def test_a_first_handle_does_not_lead_to_the_callers_tensor():
    layer = KVQLayer(0, KVQCacheConfig().for_layer(0))
    keys = torch.randn(1, 2, 5, 64)
    handle, _ = layer.update(keys, keys.clone(), packed=True)
    before = keys.clone()
    (handle[:, :, :2]).zero_()
    assert torch.equal(keys, before)


def test_states_that_gradients_flow_to_come_back_as_tensors():
    config = Qwen2Config(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, attn_implementation="kvq")
    states = torch.randn(1, 2, 300, 32)
    assert isinstance(KVQ(model=config).update(states, states, 0)[0], PackedStates)
    wanted = states.clone().requires_grad_()
    keys, values = KVQ(model=config).update(wanted, wanted * 2, 0)
    assert not isinstance(keys, PackedStates)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(wanted.grad, torch.full_like(wanted, 3))
    with torch.no_grad():
        assert isinstance(KVQ(model=config).update(wanted, wanted, 0)[0], PackedStates)
