"""Invariant 6: `memory()` sums the storages that exist, and a census of the process from outside agrees."""

import gc

import pytest
import torch
from drawn_cases import COVERING, cases, example_count, feed, pieces, splits
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq import KVQ
from kvq.attention.traced.ticket import Ticket
from kvq.store.read_states import ReadStates


@pytest.fixture(scope="module", autouse=True)
def only_new_objects():
    """Leave what exists already out of the garbage collector's lists, which makes a census fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_storages():
    """Return the bytes of the storages of tensors that are alive, by address, seen by the garbage collector alone."""
    gc.collect()
    # `type`, since isinstance would wake up lazy module attributes of libraries.
    things = gc.get_objects()
    tickets = {id(thing.number) for thing in things if type(thing) is Ticket}  # 8 bytes that name a cache, no states
    tensors = [thing for thing in things if type(thing) in (torch.Tensor, ReadStates) and id(thing) not in tickets]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def census(before):
    """Return the bytes of the storages that are alive and were not before."""
    return sum(nbytes for address, nbytes in live_storages().items() if address not in before)


def operate(cache, case, data):
    """Do one drawn operation on the batch or the length of a cache."""
    layer = cache.layers[0]
    rows = layer.side("key").store.batch_size
    operation = data.draw(st.sampled_from(["reorder", "repeat", "select", "crop", "deepen"]))
    if operation == "reorder":
        cache.reorder_cache(torch.arange(rows).flip(0))
    elif operation == "repeat":
        cache.batch_repeat_interleave(2 if rows <= 4 else 1)
    elif operation == "select":
        cache.batch_select_indices(torch.arange(0, rows, 2))
    elif operation == "crop":
        cache.crop(-data.draw(st.integers(0, cache.get_seq_length() - 1)))
    else:
        feed(layer, tuple(side[torch.arange(rows) % case.batch] for side in case.states(70)))


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_the_report_is_what_a_census_finds(quantization, data):
    case = data.draw(cases(quantization))
    states, sizes = case.states(), data.draw(splits(case.tokens))
    feed(case.layer(), states)  # whatever a library keeps from its first call on is there before the count
    before = live_storages()
    cache = KVQ(case.config(), padding=case.padding)
    for keys, values in pieces(states, sizes):
        cache.update(keys, values, 0)
    del keys, values
    assert cache.memory().total_bytes == census(before)
    for _ in range(data.draw(st.integers(0, 3))):
        operate(cache, case, data)
        assert cache.memory().total_bytes == census(before)


def test_a_hidden_copy_would_be_seen_by_the_census():
    before = live_storages()
    cache = KVQ()
    cache.update(*torch.randn(2, 1, 2, 500, 64), 0)
    assert cache.memory().total_bytes == census(before)
    cache.layers[0].hidden = cache.layers[0].keys
    assert census(before) > cache.memory().total_bytes


def sum_of_lines(report):
    names = (
        "packed_bytes", "window_bytes", "sink_bytes", "slack_bytes", "constant_bytes", "index_bytes", "survivor_bytes"
    )  # fmt: skip
    sides = [side for layer in report.layers for side in (layer.key, layer.value)]
    assert [side.total_bytes for side in sides] == [sum(getattr(side, name) for name in names) for side in sides]
    return sum(side.total_bytes for side in sides)


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(2))
@given(data=st.data())
def test_the_lines_of_the_report_add_up(quantization, data):
    case = data.draw(cases(quantization))
    cache = KVQ(case.config(), padding=case.padding)
    for piece in pieces(case.states(), data.draw(splits(case.tokens))):
        for layer in range(2):
            cache.update(*piece, layer)
    report = cache.memory()
    assert report.total_bytes == sum_of_lines(report)
    assert report.shared_bytes == 0
    tokens = case.batch * case.heads * case.tokens * (case.key_dim + case.value_dim)
    assert report.full_precision_bytes == 2 * tokens * case.dtype.itemsize


def test_the_lines_add_up_after_a_crop():
    cache = KVQ()
    cache.update(*torch.randn(2, 2, 2, 900, 64), 0)
    cache.crop(-500)
    report = cache.memory()
    assert report.total_bytes == sum_of_lines(report)
    assert report.cropped_bytes == 2 * 2 * 2 * (400 % 64) * 64 * 4
    assert "cropped" in str(report)
    assert "cropped" not in str(KVQ().memory())


def test_the_lines_add_up_after_a_reorder():
    cache = KVQ()
    for tokens in (900, 600):
        cache.update(*torch.randn(2, 2, 2, tokens, 64), 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    report = cache.memory()
    assert report.total_bytes == sum_of_lines(report)
    assert sum(side.index_bytes for side in (report.layers[0].key, report.layers[0].value)) == 2 * 2 * 8


def test_slack_is_counted():
    layer_states = torch.randn(2, 1, 2, 32 * 21, 64)
    cache = KVQ(residual_length=0, axis_key="per_token", axis_value="per_token")
    for start in range(0, 32 * 21, 32):
        cache.update(*layer_states[:, :, :, start : start + 32], 0)
    report = cache.memory()
    allocated = [tensor.nbytes for _, side in cache.layers[0].sides() for tensor, _ in side.store.tensors()]
    used = [tensor.nbytes * share for _, side in cache.layers[0].sides() for tensor, share in side.store.tensors()]
    assert report.slack_bytes == sum(allocated) - sum(used) > 0
    assert report.packed_bytes == sum(used)
