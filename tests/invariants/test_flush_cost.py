"""Invariant 7: a flush touches as much after 16,000 tokens as after 1,000; a handle materializes nothing."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from drawn_cases import COVERING
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvq.config import KVQCacheConfig
from kvq.encoding.library import EncodeLibrary, find_encode_library, why_encode_unavailable
from kvq.encoding.structure import EncodeRequest
from kvq.layers.quantized_layer import KVQLayer

HEADS, DIM, RESIDUAL, FLUSH = 2, 8, 64, 32
MAX_CHUNK_TOKENS = 2048


class CostCounter(TorchDispatchMode):
    """Counts, by operation, calls, elements read and bytes that are newly allocated; views are free.

    What is only set aside (`empty`) is counted by itself: a flush that opens a chunk makes room for later ones.
    """

    def __init__(self):
        super().__init__()
        self.costs = Counter()
        self.largest_output = 0
        self.set_aside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([leaf for leaf in tree_leaves(tree) if type(leaf) is torch.Tensor] for tree in (
            (args, kwargs), result
        ))  # fmt: skip
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage().data_ptr() not in known]
        if func is torch.ops.aten.empty.memory_format:
            self.set_aside += sum(tensor.untyped_storage().nbytes() for tensor in outputs)
        elif fresh or func._schema.is_mutable or not outputs:
            name = str(func)
            self.costs[name, "calls"] += 1
            self.costs[name, "elements read"] += sum(tensor.numel() for tensor in inputs)
            self.costs[name, "bytes allocated"] += sum(tensor.untyped_storage().nbytes() for tensor in fresh)
            self.largest_output = max([self.largest_output, *(tensor.numel() for tensor in fresh)])
        return result


def periodic_states(period, tokens):
    """Return keys and values that repeat, so that every flush quantizes the same and takes as many iterations."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2, 1, HEADS, period, DIM, generator=generator)
    return block.repeat(1, 1, 1, -(-tokens // period), 1)[:, :, :, :tokens]


@contextmanager
def encoding_each_block_once(layer):
    """Remember, while history is built, how a block was encoded: that is not measured, and slow with hqq."""
    quantizers = [side.codec for _, side in layer.sides()]
    for quantizer in quantizers:
        quantizer.encode = Memory(quantizer.encode)
    yield
    for quantizer in quantizers:
        del quantizer.encode


class Memory:
    """A function of one tensor that computes once for equal tensors."""

    def __init__(self, function):
        self.function = function
        self.known = {}

    def __call__(self, states):
        key = states.contiguous().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.function(states)
        return self.known[key]


def measure_updates(quantization, tokens, rotation="none"):
    """Return the costs of updates at that length: one that flushes nothing, then some that flush a block each.

    The first of these opens a chunk; the others fill it, up to the last but one of the 8 that it holds at 1k tokens.
    """
    layer = KVQLayer(
        0,
        KVQCacheConfig(
            backend=quantization.backend,
            nbits_k=quantization.nbits,
            nbits_v=quantization.nbits,
            axis_key=quantization.key_axis,
            axis_value=quantization.value_axis,
            q_group_size=FLUSH,
            residual_length=RESIDUAL,
            rotation_k=rotation,
            rotation_v=rotation,
            backend_options={quantization.name: dict(quantization.options)} if quantization.options else {},
        ).for_layer(0),
    )
    length = tokens + RESIDUAL
    states = periodic_states(FLUSH, length + 7 * FLUSH)
    layer.update(*states[:, :, :, :1], packed=True)
    with encoding_each_block_once(layer):
        layer.update(*states[:, :, :, 1:length], packed=True)
    assert layer.side("key").store.length == tokens
    counters = []
    for flushed, size in ((0, FLUSH - 1), (FLUSH, 1), *[(FLUSH, FLUSH)] * 5):
        stored = layer.side("key").store.length
        with CostCounter() as counter:
            keys, values = layer.update(*states[:, :, :, length : length + size], packed=True)
        length += size
        assert keys.shape[2] == values.shape[2] == length
        assert layer.side("key").store.length - stored == flushed
        counters.append(counter)
    for _, side in layer.sides():
        assert max(chunk.capacity * side.store.block_length for chunk in side.store.segments) <= MAX_CHUNK_TOKENS
    return counters


@pytest.fixture
def counted(monkeypatch):
    """Let torch quantize: the counter does not see what C does."""
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "eager")


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("quantization", COVERING, ids=str)
def test_a_flush_costs_the_same_at_1k_and_at_16k_tokens(quantization):
    short, long = measure_updates(quantization, 1024), measure_updates(quantization, 16384)
    for one, other in zip(short, long, strict=True):
        assert one.costs == other.costs
        assert one.largest_output == other.largest_output < HEADS * 1024 * DIM, "history was materialized"
    plain, *flushes = long
    assert 0 < sum(plain.costs.values()) < min(sum(flush.costs.values()) for flush in flushes)
    assert flushes[1].costs == flushes[-1].costs, "what the chunk holds already was touched"
    # Room is made for one chunk of each side at most, and for the window.
    room = 2 * HEADS * (MAX_CHUNK_TOKENS + RESIDUAL + 2 * FLUSH) * DIM * 4
    assert max(counter.set_aside for counter in (*short, *long)) <= room


@pytest.mark.usefixtures("counted")
def test_a_flush_under_rotation_costs_the_same_too():
    chosen = next(quantization for quantization in COVERING if quantization.name == "quanto")
    short, long = (measure_updates(chosen, tokens, "hadamard") for tokens in (1024, 16384))
    assert [counter.costs for counter in short] == [counter.costs for counter in long]


@pytest.mark.parametrize("backend", ["native", "quanto"])
def test_c_is_given_the_flushed_block_alone(monkeypatch, backend):
    library, blocks = find_encode_library(), []
    if library is None:
        pytest.skip(why_encode_unavailable())

    def encode(place):
        request = EncodeRequest.from_address(place)
        blocks.append((request.batch, request.heads, request.blocks, request.block_length))
        return library.encode(place)

    chosen = next(one for one in COVERING if one.name == backend and one.nbits == 4)
    monkeypatch.setattr("kvq.encoding.encoder.find_encode_library", lambda: EncodeLibrary(encode, None))
    given = []
    for tokens in (1024, 16384):
        counters = measure_updates(chosen, tokens)
        given.append([sum(counter.costs.values()) for counter in counters])
        flushes = 6 * 2 * (1 if backend == "native" else 2)  # two sides; quanto is called between two halves
        assert {block[2] * block[3] for block in blocks[-flushes:]} == {FLUSH}
    assert given[0] == given[1]


@pytest.mark.usefixtures("counted")
def test_chunks_are_opened_so_seldom_that_room_stays_in_proportion():
    layer = KVQLayer(0, KVQCacheConfig(residual_length=0, axis_key="per_token").for_layer(0))
    states = periodic_states(32, 4096)
    with CostCounter() as counter:
        for start in range(0, 4096, 32):
            layer.update(*states[:, :, :, start : start + 32], packed=True)
    held = sum(tensor.nbytes for _, side in layer.sides() for tensor, _ in side.store.tensors())
    windows = 2 * 128 * HEADS * 32 * DIM * 4
    assert counter.set_aside <= held + windows


def test_the_counter_sees_what_it_should():
    tokens = torch.randn(2, 2, 300, 8)
    layer = KVQLayer(0, KVQCacheConfig(residual_length=0).for_layer(0))
    layer.update(tokens, tokens)
    with CostCounter() as counter:
        tokens[:, :, 5:9].transpose(2, 3)
    assert not counter.costs, "views are free"
    with CostCounter() as counter:
        handle, _ = layer.update(tokens[:, :, :1], tokens[:, :, :1], packed=True)
        before = counter.largest_output
        handle + 0
    assert before < counter.largest_output >= handle.numel()
