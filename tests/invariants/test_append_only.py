"""Invariant 1: what is stored of a token never changes, nor does its error, however long generation goes on."""

import pytest
import torch
from drawn_cases import (
    COVERING,
    MANY_FLUSHES,
    cases,
    example_count,
    is_same,
    pieces,
    splits,
    stored_bytes,
    stored_length,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(6))
@given(data=st.data())
def test_stored_tokens_stay_as_they_are(quantization, data):
    # Long ones too: only then are chunks large enough to be filled by several flushes.
    case = data.draw(cases(quantization, flushes=data.draw(st.sampled_from([(2, 6), (MANY_FLUSHES, 24)]))))
    sizes = data.draw(splits(case.tokens))
    layer, packed, decoded, flushes = case.layer(), {}, {}, 0
    for keys, values in pieces(case.states(), sizes):
        before = stored_length(layer) if layer.is_initialized else 0
        layer.update(keys, values, packed=True)
        if stored_length(layer) == before:
            continue
        flushes += 1
        for part, tensor in stored_bytes(layer).items():
            known = packed.get(part, tensor[:, :, :0])
            assert torch.equal(tensor[:, :, : known.shape[2]], known), part
            packed[part] = tensor
        for name, side in layer.sides():
            states = side.view().decode_stored(0, side.store.length)
            known = decoded.get(name, states[:, :, :0])
            assert is_same(states[:, :, : known.shape[2]], known), name
            decoded[name] = states
    assert flushes


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_a_view_goes_on_reading_what_it_was_taken_of(quantization, data):
    case = data.draw(cases(quantization, flushes=(2, 4)))
    sizes = data.draw(splits(case.tokens))
    layer, views = case.layer(), []
    for piece in pieces(case.states(), sizes):
        layer.update(*piece, packed=True)
        if not views or stored_length(layer) != views[-1][0].store.length:
            views += [(side.view(), side.view().materialize()) for _, side in layer.sides()]
    for view, states in views:
        assert is_same(view.materialize(), states)
