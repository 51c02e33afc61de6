"""Invariant 2: what is stored depends on the states, not on how updates or the batch split them."""

import copy

import pytest
import torch
from drawn_cases import (
    COVERING,
    MANY_FLUSHES,
    Split,
    cases,
    example_count,
    feed,
    is_same,
    pieces,
    splits,
    stored_bytes,
    stored_length,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer


def assert_same_layers(one, other, rows=slice(None)):
    """Assert that `other` holds what `one` holds in those rows, packed and read."""
    expected, found = stored_bytes(one), stored_bytes(other)
    assert found.keys() == expected.keys() != set()
    for part, tensor in expected.items():
        assert torch.equal(found[part], tensor[rows]), part
    assert is_same(other.keys, one.keys[rows])
    assert is_same(other.values, one.values[rows])


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(4))
@given(data=st.data())
@pytest.mark.case(
    "a prompt in one call or token by token", "the same bytes are stored", report="huggingface/transformers#35185"
)
def test_the_split_into_updates_leaves_no_trace(quantization, data):
    case = data.draw(cases(quantization))
    states = case.states()
    one = feed(case.layer(), states, data.draw(splits(case.tokens)))
    other = case.layer()
    for piece in pieces(states, data.draw(splits(case.tokens))):
        other.update(*piece, packed=piece[0].shape[2] % 2 == 0)
    assert_same_layers(one, other)


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(3))
@given(data=st.data())
@pytest.mark.case(
    "decoding for a long time, one token a call",
    "the window stays bounded: tokens leave it at fixed positions",
    report="rajveer43/VeloxQuant-MLX#89",
)
def test_flushes_happen_at_fixed_positions(quantization, data):
    case = data.draw(cases(quantization))
    layer, total = case.layer(), 0
    for piece in pieces(case.states(), data.draw(splits(case.tokens))):
        layer.update(*piece, packed=True)
        total += piece[0].shape[2]
        length = case.flush_length
        assert stored_length(layer) == max(0, total - case.residual_length) // length * length
        assert {side.store.length + side.window.length for _, side in layer.sides()} == {total}


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(3))
@given(data=st.data())
def test_a_row_is_stored_as_if_it_were_alone(quantization, data):
    case = data.draw(cases(quantization))
    states = case.states()
    together = feed(case.layer(), states)
    row = data.draw(st.integers(0, case.batch - 1)) if quantization.keeps_rows_apart else 0
    padding = None if case.padding is None else (case.padding[row],)
    alone = feed(case.layer(padding), tuple(side[row : row + 1] for side in states), data.draw(splits(case.tokens)))
    assert_same_layers(together, alone, slice(row, row + 1))


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_copies_part_from_the_original(quantization, data):
    # Ten flushes and more, one at a time: that late a chunk is opened with room for later ones, which a copy may share.
    case = data.draw(cases(quantization, flushes=(MANY_FLUSHES, 16)))
    states = case.states()
    flushes = data.draw(st.sampled_from([1, 2, 9]) | st.integers(1, (case.tokens - 1) // case.flush_length))
    half = flushes * case.flush_length + data.draw(st.integers(0, case.flush_length))
    half = min(case.residual_length + half, case.tokens - 1)
    sizes = Split([case.flush_length] * (half // case.flush_length) + [half % case.flush_length])
    begun, rest = pieces(states, [half, case.tokens - half])
    rests = [rest, *(case.states(case.tokens - half, seed=seed) for seed in (1, 2))]
    expected = [feed(feed(case.layer(), begun), one) for one in rests]
    assert_same_layers(feed(case.layer(), states), expected[0])
    for make_copy in (KVQLayer.fork, copy.deepcopy):
        original = feed(case.layer(), begun, sizes)
        found = [original, *(make_copy(original) for _ in rests[1:])]
        for layer, one in zip(found, rests, strict=True):
            feed(layer, one)
        for one, other in zip(expected, found, strict=True):
            assert_same_layers(one, other)


def test_a_fork_made_before_the_first_flush_has_constants_of_its_own():
    quantization = next(q for q in COVERING if not q.keeps_rows_apart)
    config = KVQCacheConfig(backend=quantization.backend, nbits_k=8, nbits_v=8, residual_length=0)
    states = torch.randn(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    original = feed(KVQLayer(0, config.for_layer(0)), tuple(states[:, :, :, :10]))
    feed(original.fork(), tuple(states[:, :, :, 10:] * 1000))
    feed(original, tuple(states[:, :, :, 10:]))
    assert_same_layers(feed(KVQLayer(0, config.for_layer(0)), tuple(states)), original)
