"""Invariant 3: sinks and the newest tokens come back bit for bit, and shape nothing of what is quantized."""

from dataclasses import replace

import pytest
import torch
from drawn_cases import COVERING, cases, example_count, feed, is_same, pieces, splits, stored_bytes, stored_length
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer


def exact_tokens(case, total):
    """Return a mask `[B, T]` of the tokens that must be exact, by the words of the configuration."""
    position = torch.arange(total)
    starts = torch.tensor(case.starts)[:, None]
    is_sink = (position >= starts) & (position < starts + case.sink_length)
    return is_sink | (position >= total - case.residual_length)


def assert_exact(case, held, states):
    mask = exact_tokens(case, states.shape[2])
    assert held.dtype == states.dtype
    assert held.shape == states.shape
    assert is_same(held.transpose(1, 2)[mask], states.transpose(1, 2)[mask])


@pytest.mark.case(
    "a prompt longer than residual_length",
    "its newest tokens stay exact, and so does each newest one later",
    report="huggingface/transformers#34189",
)
@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(4))
@given(data=st.data())
def test_sinks_and_window_bit_for_bit(quantization, data):
    case = data.draw(cases(quantization))
    states, sizes = case.states(), data.draw(splits(case.tokens))
    layer, total = case.layer(), 0
    checked = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3)) | {len(sizes) - 1}
    for index, (keys, values) in enumerate(pieces(states, sizes)):
        layer.update(keys, values, packed=True)
        total += keys.shape[2]
        if index in checked and total:
            assert_exact(case, layer.keys, states[0][:, :, :total])
            assert_exact(case, layer.values, states[1][:, :, :total])


@pytest.mark.parametrize("residual_length", [1, 7, 50])
def test_a_flush_waits_for_the_last_token_that_it_needs(residual_length):
    layer = KVQLayer(0, KVQCacheConfig(residual_length=residual_length, q_group_size=32).for_layer(0))
    keys, values = torch.randn(2, 1, 2, residual_length + 32, 16, generator=torch.Generator().manual_seed(0))
    for token in range(residual_length + 32):
        assert not token or stored_length(layer) == 0
        layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1], packed=True)
    assert stored_length(layer) == 32
    assert is_same(layer.keys[:, :, 32:], keys[:, :, 32:])


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_the_ends_are_no_longer_than_that(quantization, data):
    """So that the test above cannot pass by quantizing nothing: every other stored token is in part wrong."""
    case = data.draw(cases(quantization))
    case = replace(case, dtype=torch.float32)
    layer, (keys, _) = feed(case.layer(), case.states()), case.states()
    stored = stored_length(layer)
    position, starts = torch.arange(stored), torch.tensor(case.starts)[:, None]
    quantized = (position >= starts + case.sink_length)[:, None].expand(-1, case.heads, -1)
    error = (layer.keys != keys)[:, :, :stored].any(dim=-1)
    assert bool(quantized.any()) == (stored > min(case.starts) + case.sink_length)
    assert error[quantized].float().mean() > 0.9 if quantized.any() else not error.any()


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_the_states_of_the_present_forward_are_returned_exact(quantization, data):
    case = data.draw(cases(quantization))
    states, last = case.states(), data.draw(st.integers(1, case.tokens - 1))
    layer = feed(case.layer(), tuple(side[:, :, :-last] for side in states))
    history = (layer.keys, layer.values)
    returned = layer.update(*(side[:, :, -last:] for side in states))
    for held, found, side in zip(history, returned, states, strict=True):
        assert is_same(found, torch.cat([held, side[:, :, -last:]], dim=2))


@pytest.mark.case(
    "padding on the left of one row", "changes no scale of its tokens, with any content", report="Blaizzy/mlx-vlm#1946"
)
@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(3))
@given(data=st.data())
def test_padding_and_sinks_shape_nothing_that_is_stored(quantization, data):
    case = data.draw(cases(quantization))
    states = case.states()
    plain = stored_bytes(feed(case.layer(), states))
    for row, start in enumerate(case.starts):
        for side in states:
            side[row, :, : start + case.sink_length] = side[row, :, : start + case.sink_length].flip(-1) * -37 + 5
    assert not torch.isnan(states[0]).any()
    changed = feed(case.layer(), states)
    for part, tensor in stored_bytes(changed).items():
        assert torch.equal(tensor, plain[part]), part
    assert_exact(case, changed.keys, states[0])
