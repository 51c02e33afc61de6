"""One quantized layer: what neither the invariants nor the table of bad input say of it."""

import pytest
import torch

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.layers.quantized_layer import KVQLayer

LONG_WINDOW = dict(residual_length=128)


def make_layer(padding=None, **fields):
    return KVQLayer(0, KVQCacheConfig(**fields).for_layer(0), padding)


def draw(tokens, batch=2, heads=2, key_dim=64, value_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, key_dim, generator=generator) * 3
    values = torch.randn(batch, heads, tokens, value_dim, generator=generator)
    return keys.to(dtype), values.to(dtype)


def feed(layer, keys, values, sizes):
    start = 0
    for size in sizes:
        layer.update(keys[:, :, start : start + size], values[:, :, start : start + size])
        start += size
    assert start == keys.shape[2]
    return layer


def stored_bytes(layer):
    """The packed bytes by side and part, in order of blocks, without slack."""
    found = {}
    for name, side in layer.sides():
        for segment in side.store.segments:
            for part, tensor in segment.read(0, segment.used).items():
                found.setdefault((name, part), []).append(tensor)
    return {key: torch.cat(tensors, dim=2) for key, tensors in found.items()}


def test_what_is_returned_aliases_nothing_in_the_layer():
    keys, values = draw(300)
    layer = feed(make_layer(), keys[:, :, :290], values[:, :, :290], [290])
    returned, _ = layer.update(keys[:, :, 290:], values[:, :, 290:])
    before = layer.keys
    returned.zero_()
    keys.zero_()
    assert torch.equal(layer.keys, before)


def test_a_crop_within_the_window_leaves_the_store_as_plain_growth_makes_it():
    keys, values = draw(500)
    layer = feed(make_layer(**LONG_WINDOW), keys, values, [500])
    layer.crop(-100)
    layer.update(keys[:, :, 400:], values[:, :, 400:])
    straight = feed(make_layer(**LONG_WINDOW), keys, values, [500])
    assert all(
        torch.equal(a, b) for a, b in zip(stored_bytes(layer).values(), stored_bytes(straight).values(), strict=True)
    )


def test_gradients_flow_through_the_present_states_only():
    keys, values = draw(300)
    layer = feed(make_layer(), keys, values, [300])
    new_keys, new_values = draw(5, seed=2)
    new_keys.requires_grad_()
    returned, _ = layer.update(new_keys, new_values)
    returned.sum().backward()
    assert torch.equal(new_keys.grad, torch.ones_like(new_keys))
    assert not layer.keys.requires_grad


def test_inference_mode_may_end_between_updates():
    keys, values = draw(400)
    layer = make_layer()
    with torch.inference_mode():
        feed(layer, keys[:, :, :310], values[:, :, :310], [310])
    layer.update(keys[:, :, 310:], values[:, :, 310:])
    assert torch.equal(layer.keys, feed(make_layer(), keys, values, [400]).keys)


def test_reset_forgets_shape_and_tokens():
    layer = feed(make_layer(), *draw(300), [300])
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(*draw(7, batch=1, key_dim=32, value_dim=32))
    assert layer.get_seq_length() == 7


def test_the_callers_index_is_copied_and_checked_first():
    layer = feed(make_layer(), *draw(300), [300])
    index = torch.tensor([1, 0])
    layer.reorder_cache(index)
    before = layer.keys
    index.zero_()
    assert torch.equal(layer.keys, before)
    with pytest.raises(IndexError):
        layer.reorder_cache(torch.tensor([7, 0]))
    assert torch.equal(layer.keys, before)


def test_a_reordered_open_chunk_is_not_written_to():
    keys, values = draw(128 + 64 * 13)
    layer = feed(make_layer(**LONG_WINDOW), keys, values, [keys.shape[2]])
    assert any(s.used < s.capacity for s in layer.side("key").store.segments), "the last chunk has room"
    layer.reorder_cache(torch.tensor([1, 0]))
    more = draw(64, seed=3)
    layer.update(*more)
    whole = [torch.cat([old[[1, 0]], new], dim=2) for old, new in zip((keys, values), more, strict=True)]
    expected = feed(make_layer(**LONG_WINDOW), *whole, [whole[0].shape[2]])
    assert layer.side("key").store.length == 64 * 14
    assert torch.equal(layer.keys, expected.keys)
    assert torch.equal(layer.values, expected.values)


def test_partial_sinks_survive_a_fork_made_under_inference_mode():
    layer = make_layer(sink_length=100, residual_length=0)
    with torch.inference_mode():
        layer.update(*draw(70))
        other = layer.fork()
        layer.reorder_cache(torch.tensor([1, 0]))
    for one in (layer, other):
        one.update(*draw(70, seed=1))
        assert one.get_seq_length() == 140


def test_reset_drops_the_padding():
    layer = feed(make_layer(padding=(3, 0)), *draw(300), [300])
    layer.reset()
    layer.update(*draw(5, batch=1))
    assert layer.get_seq_length() == 5


@pytest.mark.parametrize(("field", "other"), [("compute_dtype", "bfloat16"), ("metadata_dtype", "bfloat16")])
def test_dtypes_of_computing_and_metadata_are_obeyed(field, other):
    keys, values = draw(300)
    usual, coarse = (feed(make_layer(**fields), keys, values, [300]) for fields in ({}, {field: other}))
    error, coarser = ((layer.keys - keys)[:, :, :128].norm() for layer in (usual, coarse))
    assert coarser > error
    if field == "metadata_dtype":
        assert stored_bytes(coarse)["key", "scale"].dtype == torch.bfloat16


def test_where_the_store_lives():
    from kvq.layers.store_device import choose_store_device

    here = torch.device("cpu")
    assert choose_store_device(None, here) == here
    with pytest.warns(UserWarning, match="device='cuda:0', but states are on 'cuda:1'"):
        assert choose_store_device(torch.device("cuda:0"), torch.device("cuda:1")) == torch.device("cuda:1")
    assert choose_store_device(torch.device("cuda"), torch.device("cuda:1")) == torch.device("cuda:1")
    assert choose_store_device(torch.device("meta"), here) == torch.device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: 'cuda' cannot be used here"):
            make_layer(device="cuda").update(*draw(3))


def test_operations_on_an_empty_layer_do_nothing():
    layer = make_layer()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(2)
    layer.crop(-3)
    assert layer.get_seq_length() == 0
