"""Held bytes: at every length, against DynamicCache, and line by line."""

import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ


def feed(cache, tokens, layers=1, batch=1, heads=2, dim=64, dtype=torch.float16):
    for layer in range(layers):
        states = torch.randn(batch, heads, tokens, dim, dtype=dtype)
        cache.update(states, states.clone(), layer)
    return cache


def lengths_of_updates(flush, total):
    """Yield the sizes of updates: single tokens at first, then those between which held bytes change.

    A window grows by a step and a store by a block, so that after some hundred tokens nothing new happens between the
    token that opens a step, the one before a flush and the one that flushes.
    """
    yield from [1] * 512
    for _ in range((total - 512) // flush):
        yield from (1, flush - 2, 1)


@pytest.mark.parametrize(
    ("fields", "flush"),
    [
        ({}, 64),
        (dict(nbits_k=8, nbits_v=8), 64),
        (dict(nbits_k=2, nbits_v=2, axis_key="per_token", axis_value="per_token"), 32),
        (dict(sink_length=0, residual_length=0), 64),
    ],
    ids=["defaults", "8 bit", "2 bit", "no window"],
)
def test_at_every_length_at_most_one_group_more_than_dynamic_cache(fields, flush):
    cache = KVQ(**fields)
    token_bytes = 2 * 2 * 64 * 2
    cache.update(*torch.zeros(2, 1, 2, 0, 64, dtype=torch.float16), 0)
    (layer,) = cache.layers
    length, reported = 0, {}
    for size in lengths_of_updates(flush, total=6400):
        layer.update(*torch.randn(2, 1, 2, size, 64, dtype=torch.float16), packed=True)  # nothing is materialized
        length += size
        chunks = [(tensor.nbytes, share) for _, side in layer.sides() for tensor, share in side.store.tensors()]
        exact = [side.window.buffer for _, side in layer.sides()]
        exact += [side.sinks.states for _, side in layer.sides() if side.sinks.states is not None]
        constants = [tensor for _, side in layer.sides() for tensor in side.codec.constants().values()]
        held = sum(nbytes for nbytes, _ in chunks) + sum(tensor.nbytes for tensor in exact + constants)
        assert held <= (length + 64) * token_bytes, length
        if length > 1000:
            packed = sum(nbytes * share for nbytes, share in chunks)
            assert sum(nbytes for nbytes, _ in chunks) - packed <= 0.25 * packed, length
        if length in (100, 300, 1024, 2432, 4032, 6400):
            memory = cache.memory()
            assert memory.total_bytes == held
            reported[length] = memory.compression
    assert list(reported) == [100, 300, 1024, 2432, 4032, 6400]
    assert reported[6400] > reported[300]


def test_the_parts_add_up():
    memory = feed(KVQ(), 777, layers=3).memory()
    parts = memory.packed_bytes + memory.window_bytes + memory.sink_bytes + memory.slack_bytes + memory.constant_bytes
    assert parts == memory.total_bytes == sum(layer.total_bytes for layer in memory.layers)
    assert memory.constant_bytes == 3 * 2 * 64, "the signs of the rotations, a byte each"
    assert memory.sink_bytes == 3 * 2 * 4 * 2 * 64 * 2
    assert memory.window_bytes == 3 * 2 * (777 - 704) * 2 * 64 * 2


def test_full_precision_bytes_are_those_of_dynamic_cache():
    cache, plain = KVQ(), DynamicCache()
    for tokens in (300, 45):
        feed(cache, tokens, layers=2, batch=3)
        feed(plain, tokens, layers=2, batch=3)
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert cache.memory().full_precision_bytes == expected
    assert cache.memory().compression == expected / cache.memory().total_bytes


def test_effective_bits_count_codes_metadata_and_slack():
    fields = dict(nbits_k=4, nbits_v=2, sink_length=0)
    memory = feed(KVQ(fields), 32 + 64 * 16).memory()
    # 64 codes of 4 bit, scale and mid of 16 bit a group, one exponent byte for the 64 x 64 elements of a block, and a
    # factor of one byte for the 64 elements of a token.
    assert memory.effective_bits_key == pytest.approx(4 + 32 / 64 + 8 / 4096 + 8 / 64)
    assert memory.effective_bits_value == pytest.approx(2 + 32 / 64 + 8 / 4096 + 8 / 64)
    by_token = feed(KVQ(fields, axis_value="per_token"), 32 + 64 * 16).memory()
    assert by_token.effective_bits_value == pytest.approx(2 + 32 / 64 + 8 / (32 * 64)), "such groups have no factors"
    grown = feed(KVQ(fields), 32)
    for _ in range(9):
        feed(grown, 64)
    assert grown.memory().effective_bits_key > memory.effective_bits_key, "an open chunk is not free"


def test_shared_chunks_are_counted_by_each_cache_and_once_in_the_process():
    cache = feed(KVQ(), 900)
    fork = cache.fork()
    pointers = [
        {tensor.untyped_storage().data_ptr() for tensor, _ in one.layers[0].side("key").store.tensors()}
        for one in (cache, fork)
    ]
    assert pointers[0] == pointers[1]


def test_the_report_prints_as_a_table_and_in_notebooks():
    memory = feed(KVQ(backend={"key": "quanto", "value": "hqq"}), 543, layers=4).memory()
    text = str(memory)
    assert "0-3" in text
    assert "quanto 4 bit" in text
    assert "hqq 2 bit" in text
    assert f"{memory.compression:.2f}x smaller" in text
    assert memory._repr_html_().startswith("<pre>")
    assert str(KVQ().memory())


def test_the_parts_add_up_after_a_reorder():
    cache = feed(KVQ(), 900, layers=2, batch=3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    memory = cache.memory()
    assert sum(side.total_bytes for layer in memory.layers for side in (layer.key, layer.value)) == memory.total_bytes
    assert memory.layers[0].key.index_bytes == 3 * 8
    assert memory.shared_bytes == 0


def test_storages_of_two_layers_count_once():
    from kvq.layers.held_bytes import report_memory

    cache = feed(KVQ(), 900)
    fork = cache.fork()
    memory = report_memory([cache.layers[0], fork.layers[0]])
    assert memory.shared_bytes == memory.total_bytes == memory.layers[0].total_bytes
    feed(fork, 1)
    memory = report_memory([cache.layers[0], fork.layers[0]])
    window = sum(side.window.buffer.nbytes for _, side in fork.layers[0].sides())
    assert memory.total_bytes == memory.layers[0].total_bytes + window, "the one that grows copies its window"
