"""Crops into the store: a group that is cut is quantized a second time, and never a third."""

import pytest
import torch
from drawn_cases import QUANTIZATIONS, cases, example_count, feed, is_same, stored_bytes, stored_length
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq import KVQ

CYCLES = 4


@pytest.mark.case(
    "a crop into the quantized tokens",
    "the tokens left of a cut group stay as they were, and the length is right",
    report="huggingface/transformers#45510",
)
@settings(max_examples=example_count(40))
@given(quantization=st.sampled_from(QUANTIZATIONS), data=st.data())
def test_what_survives_a_crop_comes_back_the_same_from_every_later_one(quantization, data):
    case = data.draw(cases(quantization))
    states = case.states()
    layer = feed(case.layer(), states)
    stored = stored_length(layer)
    length = data.draw(st.integers(0, stored - 1))
    start = length // case.flush_length * case.flush_length
    before = stored_bytes(layer)
    given_out = [side[:, :, :length] for side in (layer.keys, layer.values)]
    for cycle in range(1, CYCLES + 1):
        layer.crop(length - layer.get_seq_length())
        assert stored_length(layer) == start
        for found, expected in zip((layer.keys, layer.values), given_out, strict=True):
            assert is_same(found, expected), f"after crop number {cycle}"
        feed(layer, case.states(case.tokens - length, seed=cycle))
        assert stored_length(layer) == stored
        after = stored_bytes(layer)
        for (side, part), tensor in before.items():
            blocks = start // layer.side(side).store.block_length
            assert torch.equal(after[side, part][:, :, :blocks], tensor[:, :, :blocks])


@settings(max_examples=example_count(30))
@given(quantization=st.sampled_from(QUANTIZATIONS), data=st.data())
def test_a_group_that_is_cut_at_several_places_keeps_what_was_quantized_once(quantization, data):
    case = data.draw(cases(quantization))
    layer = feed(case.layer(), case.states())
    start = data.draw(st.integers(0, stored_length(layer) // case.flush_length - 1)) * case.flush_length
    once = [side.clone() for side in (layer.keys, layer.values)]
    cuts = data.draw(st.lists(st.integers(1, case.flush_length - 1), min_size=2, max_size=4))
    shortest = case.flush_length
    for turn, cut in enumerate(cuts, start=1):
        layer.crop(start + cut - layer.get_seq_length())
        shortest = min(shortest, cut)
        for found, expected in zip((layer.keys, layer.values), once, strict=True):
            assert is_same(found[:, :, : start + shortest], expected[:, :, : start + shortest])
        feed(layer, case.states(case.tokens - start - cut, seed=turn))
        once = [
            torch.cat([old[:, :, : start + cut], side[:, :, start + cut :]], dim=2)
            for old, side in zip(once, (layer.keys, layer.values), strict=True)
        ]


class OutOfMemoryError(Exception):
    """What a quantizer may raise at any time."""


@pytest.mark.parametrize("removed", [0, 3])
def test_a_crop_that_fails_leaves_the_cache_as_it_was(removed, monkeypatch):
    cache = KVQ(residual_length=32, q_group_size=32)
    cache.activate_past_recording()
    cache.update(*torch.randn(2, 2, 1, 200, 64), 0)
    layer = cache.layers[0]
    assert layer.record_past, "also where layers come later"
    assert stored_length(layer) == 0
    held = layer.keys, layer.values

    def fail(states):
        raise OutOfMemoryError

    monkeypatch.setattr(layer.side("value").codec, "encode", fail)
    with pytest.raises(OutOfMemoryError):
        cache.crop(-removed)
    assert cache.get_seq_length() == 200
    assert stored_length(layer) == layer.side("value").store.length == 0
    assert is_same(layer.keys, held[0])
    assert is_same(layer.values, held[1])
    monkeypatch.undo()
    cache.crop(-removed)
    assert stored_length(layer) == 160


def test_a_crop_by_a_number_in_a_tensor():
    """Assisted decoding of older transformers counts in tensors."""
    cache = KVQ(residual_length=32, q_group_size=32)
    cache.activate_past_recording()
    cache.update(*torch.randn(2, 2, 1, 200, 64), 0)
    cache.crop(torch.tensor(-3))
    assert (cache.get_seq_length(), stored_length(cache.layers[0])) == (197, 160)
    cache.update(*torch.randn(2, 2, 1, 40, 64), 0)
    cache.crop(torch.tensor(0))
    assert (cache.get_seq_length(), stored_length(cache.layers[0])) == (237, 192)
