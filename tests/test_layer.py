"""One quantized layer: the invariants of the store, seen from where states go in."""

import pytest
import torch

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError, StatesError
from kvq.layer import KVQLayer


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


BACKENDS = [
    dict(backend="quanto", nbits_k=4, nbits_v=2),
    dict(backend="quanto", nbits_k=8, nbits_v=8, axis_key="per_token"),
    dict(backend="hqq", nbits_k=4, nbits_v=3, axis_value="per_channel"),
]
SPLITS = {
    "tokens": [1] * 460,
    "whole": [460],
    "a token between": [300, 1, 159],
    "uneven": [37] * 12 + [16],
    "around a flush": [191, 1, 1, 267],
}


@pytest.mark.parametrize("fields", BACKENDS, ids=str)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_what_is_stored_does_not_depend_on_the_split(fields, sizes):
    keys, values = draw(460)
    layer = feed(make_layer(**fields), keys, values, sizes)
    reference = feed(make_layer(**fields), keys, values, [230, 230])
    expected, found = stored_bytes(reference), stored_bytes(layer)
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        assert torch.equal(found[part], tensor), part


def test_rows_of_a_batch_are_stored_as_if_alone():
    keys, values = draw(400)
    together = stored_bytes(feed(make_layer(backend="hqq", nbits_k=4, nbits_v=4), keys, values, [400]))
    for row in range(2):
        alone = feed(make_layer(backend="hqq", nbits_k=4, nbits_v=4), keys[row : row + 1], values[row : row + 1], [400])
        for part, tensor in stored_bytes(alone).items():
            assert torch.equal(together[part][row : row + 1], tensor)


def test_stored_bytes_never_change_afterwards():
    keys, values = draw(900)
    layer = make_layer()
    seen = {}
    for start in range(0, 900, 50):
        layer.update(keys[:, :, start : start + 50], values[:, :, start : start + 50])
        for part, tensor in stored_bytes(layer).items():
            known = seen.get(part, tensor[:, :, :0])
            assert torch.equal(tensor[:, :, : known.shape[2]], known)
            seen[part] = tensor.clone()
    assert seen["key", "codes_4"].shape[2] == (900 - 128) // 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 191, 192, 500])
@pytest.mark.case(
    "a prompt longer than residual_length",
    "its newest tokens stay exact, and so does each newest one later",
    report="huggingface/transformers#34189",
)
def test_sinks_and_window_come_back_bit_for_bit(dtype, tokens):
    keys, values = draw(tokens, dtype=dtype)
    layer = feed(make_layer(), keys, values, [tokens])
    for states, held in ((keys, layer.keys), (values, layer.values)):
        assert held.dtype == dtype
        assert held.shape == states.shape
        assert torch.equal(held[:, :, :4], states[:, :, :4])
        assert torch.equal(held[:, :, -128:], states[:, :, -128:])
    if tokens >= 192:
        assert not torch.equal(layer.keys[:, :, 4:64], keys[:, :, 4:64]), "nothing was quantized"


@pytest.mark.parametrize("length", [4, 128])
def test_the_exact_ends_are_not_one_token_longer(length):
    keys, values = draw(192)
    layer = feed(make_layer(residual_length=128, sink_length=4), keys, values, [192])
    wrong = (layer.keys != keys).any(dim=-1).any(dim=0).any(dim=0)
    assert not wrong[:4].any()
    assert not wrong[64:].any()
    assert wrong[4]
    assert wrong[63]


def test_update_returns_history_and_the_present_states_exact():
    keys, values = draw(400)
    layer = feed(make_layer(nbits_k=2), keys[:, :, :300], values[:, :, :300], [300])
    returned, _ = layer.update(keys[:, :, 300:], values[:, :, 300:])
    assert returned.shape == keys.shape
    assert torch.equal(returned[:, :, 300:], keys[:, :, 300:]), "states of the current forward are exact"
    assert layer.get_seq_length() == 400


def test_what_is_returned_aliases_nothing_in_the_layer():
    keys, values = draw(300)
    layer = feed(make_layer(), keys[:, :, :290], values[:, :, :290], [290])
    returned, _ = layer.update(keys[:, :, 290:], values[:, :, 290:])
    before = layer.keys
    returned.zero_()
    keys.zero_()
    assert torch.equal(layer.keys, before)


@pytest.mark.parametrize("removed", [1, 127, 129, 200, 333, 499, 500, 600])
@pytest.mark.case(
    "a crop into the quantized tokens",
    "the survivors stay as they were, and the length is right",
    report="huggingface/transformers#45510",
)
def test_crop_keeps_the_survivors_as_they_were(removed):
    keys, values = draw(500)
    layer = feed(make_layer(), keys, values, [500])
    before = layer.keys
    layer.crop(-removed)
    assert layer.get_seq_length() == max(0, 500 - removed)
    if removed < 500:
        assert torch.equal(layer.keys, before[:, :, : 500 - removed])
    layer.update(keys[:, :, :3], values[:, :, :3])
    assert torch.equal(layer.keys[:, :, -3:], keys[:, :, :3])


def test_a_crop_within_the_window_leaves_the_store_as_plain_growth_makes_it():
    keys, values = draw(500)
    layer = feed(make_layer(), keys, values, [500])
    layer.crop(-100)
    layer.update(keys[:, :, 400:], values[:, :, 400:])
    straight = feed(make_layer(), keys, values, [500])
    assert all(
        torch.equal(a, b) for a, b in zip(stored_bytes(layer).values(), stored_bytes(straight).values(), strict=True)
    )


def test_crop_refuses_a_positive_count():
    with pytest.raises(StatesError, match="negative"):
        make_layer().crop(5)


@pytest.mark.case(
    "reorder, repeat and select rows of a batch",
    "stored tokens follow like those of the window",
    report="huggingface/transformers#45510",
)
def test_batch_operations_follow_plain_tensors():
    keys, values = draw(350, batch=3)
    layer = feed(make_layer(), keys, values, [350])
    held = layer.keys
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    held = held[[2, 0, 0]]
    assert torch.equal(layer.keys, held)
    layer.batch_repeat_interleave(2)
    held = held.repeat_interleave(2, dim=0)
    assert torch.equal(layer.keys, held)
    more_keys, more_values = draw(80, batch=6, seed=1)
    layer.update(more_keys, more_values)
    assert torch.equal(layer.keys[:, :, -80:], more_keys)
    assert torch.equal(layer.keys[:, :, :192], held[:, :, :192]), "what was stored stays"
    layer.batch_select_indices(torch.tensor([True, False, False, True, False, True]))
    assert torch.equal(layer.keys[:, :, :192], held[[0, 3, 5]][:, :, :192])


@pytest.mark.case(
    "padding on the left of one row", "shapes no scale of its tokens, whatever it holds", report="Blaizzy/mlx-vlm#1946"
)
def test_left_padding_moves_sinks_and_shapes_no_scale():
    keys, values = draw(400)
    keys[0, :, :37], values[0, :, :37] = 1000.0, -1000.0
    layer = feed(make_layer(padding=(37, 0), nbits_k=4, nbits_v=4), keys, values, [400])
    assert torch.equal(layer.keys[0, :, 37:41], keys[0, :, 37:41])
    assert torch.equal(layer.keys[1, :, :4], keys[1, :, :4])
    padded = (layer.keys[0, :, 41:256] - keys[0, :, 41:256]).abs().mean()
    clean = (layer.keys[1, :, 41:256] - keys[1, :, 41:256]).abs().mean()
    assert padded < 1.05 * clean
    unaware = feed(make_layer(nbits_k=4, nbits_v=4), keys, values, [400])
    assert (unaware.keys[0, :, 41:64] - keys[0, :, 41:64]).abs().mean() > 10 * clean


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(batch=3), "batch size 3"),
        (dict(heads=4), "heads 4"),
        (dict(key_dim=32), "head_dim 32"),
        (dict(dtype=torch.float16), "float16"),
    ],
)
def test_a_refused_update_leaves_the_layer_as_it_was(change, named):
    keys, values = draw(300)
    layer = feed(make_layer(), keys, values, [300])
    before = layer.keys, layer.values, layer.version
    with pytest.raises(StatesError, match=named):
        layer.update(*draw(5, **change))
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])
    assert layer.version == before[2]


def test_a_quantizer_that_fails_leaves_the_layer_as_it_was(monkeypatch):
    keys, values = draw(400)
    layer = feed(make_layer(), keys[:, :, :300], values[:, :, :300], [300])
    before = layer.keys, layer.values

    def fail(states):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(layer.side("value").quantizer, "encode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            layer.update(keys[:, :, 300:], values[:, :, 300:])
    assert layer.get_seq_length() == 300
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])
    layer.update(keys[:, :, 300:], values[:, :, 300:])
    straight = feed(make_layer(), keys, values, [400])
    assert torch.equal(layer.keys, straight.keys)


@pytest.mark.parametrize("dims", [(8, 8), (48, 48), (67, 80), (192, 128), (576, 64)])
@pytest.mark.case("head dims from 8 to 576, 67 among them, unlike for keys and values", "works")
def test_any_head_dim_and_unequal_ones(dims):
    keys, values = draw(300, key_dim=dims[0], value_dim=dims[1])
    layer = feed(make_layer(nbits_k=8, nbits_v=8), keys, values, [300])
    assert layer.keys.shape == keys.shape
    assert layer.values.shape == values.shape
    assert (layer.keys - keys).abs().max() < 0.08
    assert (layer.values - values).abs().max() < 0.03


def test_states_of_another_kind_are_refused():
    with pytest.raises(StatesError, match="int64"):
        make_layer().update(torch.zeros(1, 1, 4, 8, dtype=torch.long), torch.zeros(1, 1, 4, 8))
    with pytest.raises(StatesError, match="head_dim\\] is needed"):
        make_layer().update(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    with pytest.raises(StatesError, match="differ in batch or tokens"):
        make_layer().update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 8))


def test_groups_so_small_that_nothing_is_saved_are_refused():
    layer = make_layer(q_group_size={"key": 64, "value": 2}, nbits_k=8, nbits_v=8)
    with pytest.raises(ConfigError, match="effective bits"):
        layer.update(*draw(4))
    assert layer.get_seq_length() == 0


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
    layer = feed(make_layer(), keys, values, [keys.shape[2]])
    assert any(s.used < s.capacity for s in layer.side("key").store.segments), "the last chunk has room"
    layer.reorder_cache(torch.tensor([1, 1]))
    more = draw(64, seed=3)
    layer.update(*more)
    whole = [torch.cat([old[[1, 1]], new], dim=2) for old, new in zip((keys, values), more, strict=True)]
    expected = feed(make_layer(), *whole, [whole[0].shape[2]])
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
    from kvq.layer import _store_device

    here = torch.device("cpu")
    assert _store_device(None, here) == here
    with pytest.warns(UserWarning, match="device='cuda:0', but states are on 'cuda:1'"):
        assert _store_device(torch.device("cuda:0"), torch.device("cuda:1")) == torch.device("cuda:1")
    assert _store_device(torch.device("cuda"), torch.device("cuda:1")) == torch.device("cuda:1")
    assert _store_device(torch.device("meta"), here) == torch.device("meta")
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
