"""A store on another device than the states, read ahead, and layers that move.

There is one real device here. The second one is memory of the processor under another name, "cpu:0", and every way
there and back is a copy that is counted; where only shapes and places matter it is "meta".
"""

from __future__ import annotations

import pytest
import torch
from reference_quantizers import STATIC_FLOAT8
from transformers import MistralConfig

import kvq.layers.quantized_layer
import kvq.store.segments
from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.handle import PackedPair
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.errors import ConfigError
from kvq.layers.quantized_layer import KVQLayer
from kvq.registry import register_backend

ELSEWHERE = torch.device("cpu:0")
LAYERS = 3


def draw(length, seed, *, heads=2, head_dim=64):
    return torch.randn(2, heads, length, head_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def forward(cache, length, seed):
    """Feed each layer, and return what its attention would read."""
    return [cache.update(draw(length, seed + i), draw(length, seed + i + 10), i) for i in range(LAYERS)]


@pytest.fixture
def copied(monkeypatch):
    """Count the bytes of chunks that travel; each journey is a copy, also to the other name of the same memory."""
    bytes_of = []

    def copy(part, device, *, pinned):
        bytes_of.append(part.nbytes)
        if part.is_meta or device.type == "meta":
            return torch.empty_like(part, device=device)
        return part.clone()

    monkeypatch.setattr(kvq.store.segments, "_copied_to", copy)
    return bytes_of


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(kvq.layers.quantized_layer, "choose_store_device", lambda wanted, states: ELSEWHERE)


@pytest.fixture
def events(monkeypatch):
    seen = []
    for name in ("add", "prefetch"):
        call = getattr(KVQLayer, name)

        def logged(layer, *args, call=call, name=name, **kwargs):
            seen.append((name, layer.layer_idx))
            return call(layer, *args, **kwargs)

        monkeypatch.setattr(KVQLayer, name, logged)
    return seen


def test_an_offloaded_store_gives_the_same_states(copied, monkeypatch):
    plain, offloaded = KVQ(), KVQ()
    expected = [forward(plain, length, seed) for seed, length in enumerate((300, 1, 70, 1))]
    monkeypatch.setattr(kvq.layers.quantized_layer, "choose_store_device", lambda wanted, states: ELSEWHERE)
    found = [forward(offloaded, length, seed) for seed, length in enumerate((300, 1, 70, 1))]
    assert all(layer.is_offloaded for layer in offloaded.layers)
    assert not any(layer.is_offloaded for layer in plain.layers)
    for one, other in zip(expected, found, strict=True):
        for left, right in zip(one, other, strict=True):
            assert all(map(torch.equal, left, right))
    assert sum(copied) > 0


def test_an_offloaded_window_gives_the_same_states(copied, monkeypatch):
    model = MistralConfig(sliding_window=150, num_hidden_layers=LAYERS, hidden_size=128, num_attention_heads=2)
    plain, offloaded = KVQ(model=model), KVQ(model=model)
    lengths = (100, 100, 100, 1, 60, 1, 60, 500, 1, 90)
    expected = [forward(plain, length, seed) for seed, length in enumerate(lengths)]
    monkeypatch.setattr(kvq.layers.quantized_layer, "choose_store_device", lambda wanted, states: ELSEWHERE)
    for seed, length in enumerate(lengths):
        found = forward(offloaded, length, seed)
        for left, right in zip(expected[seed], found, strict=True):
            assert all(map(torch.equal, left, right))
        for _, side in offloaded.layers[0].sides():
            brought = side.store.prefetched.keys()
            assert brought == (set(side.store.segments) if seed else set()), "of the layer that is read next"
    assert all(layer.is_offloaded and layer.dropped_length for layer in offloaded.layers)


def test_each_layer_is_brought_while_the_one_before_it_computes(elsewhere, copied, events):
    cache = KVQ()
    forward(cache, 300, 0)
    forward(cache, 1, 1)
    assert events[-6:] == [
        ("add", 0),
        ("prefetch", 1),
        ("add", 1),
        ("prefetch", 2),
        ("add", 2),
        ("prefetch", 0),
    ]
    before = len(copied)
    for index, layer in enumerate(cache.layers):
        layer_bytes = sum(part.nbytes for _, side in layer.sides() for part, _ in [*side.store.tensors()])
        staged = [len(side.store.prefetched) for _, side in layer.sides()]
        assert (min(staged) > 0) == (index == 0), "what is held beside the stores is one layer, the next to be read"
        assert layer_bytes > 0
    view = cache.layers[0].side("key").view()
    assert view.store.segments[0] is not cache.layers[0].side("key").store.segments[0], "reads go to the copy"
    cache.layers[0].release_prefetched()
    assert cache.layers[0].side("key").view().store.segments is cache.layers[0].side("key").store.segments
    assert len(copied) == before


def test_what_was_brought_counts_as_memory(elsewhere, copied):
    cache = KVQ()
    forward(cache, 300, 0)
    forward(cache, 1, 1)
    with_copy = cache.memory().total_bytes
    staged = sum(
        copied[-sum(len(side.store.writer.layout) * len(side.store.segments) for _, side in cache.layers[0].sides()) :]
    )
    cache.layers[0].release_prefetched()
    assert with_copy - cache.memory().total_bytes == staged > 0


def test_a_layer_is_offloaded_and_brought_back(copied):
    cache = KVQ()
    states = torch.empty(2, 2, 300, 64, dtype=torch.bfloat16, device="meta")
    cache.update(states, states, 0)
    layer = cache.layers[0]
    assert not layer.is_offloaded
    held = sum(part.nbytes for _, side in layer.sides() for part, _ in side.store.tensors())
    layer.offload()
    assert layer.is_offloaded
    assert sum(copied) == held
    for _, side in layer.sides():
        assert {part.device.type for part, _ in side.store.tensors()} == {"cpu"}
        assert side.window.buffer.is_meta
    layer.prefetch()
    assert sum(copied) == 2 * held
    for _, side in layer.sides():
        assert {part.device.type for s in side.view().store.segments for part in s.parts.values()} == {"meta"}
    layer.offload()
    assert sum(copied) == 2 * held, "the store is still on the processor: nothing travels a second time"


def test_a_moved_layer_is_wholly_there():
    cache = KVQ(layers={1: {"full_precision": True}}, rotation_k="none", rotation_v="none")
    forward(cache, 300, 0)
    moved = cache.layers[0].moved_to(torch.device("meta"))
    assert moved.device.type == "meta"
    for _, side in moved.sides():
        places = [side.window.buffer, side.sinks.states, *(part for part, _ in side.store.tensors())]
        assert {tensor.device.type for tensor in places} == {"meta"}
    assert cache.layers[0].keys.device.type == "cpu"


def test_a_moved_cache_goes_on_like_one_that_stayed():
    register_backend(STATIC_FLOAT8, replace=True)
    fields = {"backend": "static_float8", "nbits_k": 8, "nbits_v": 8, "layers": {"1": {"full_precision": True}}}
    stayed, moved = KVQ(**fields), KVQ(**fields)
    for cache in (stayed, moved):
        forward(cache, 300, 0)
    quantizer = moved.layers[0].side("key").codec
    moved.move_to("cpu")
    assert moved.layers[0].side("key").codec is not quantizer, "it was built anew for the device"
    for one, other in zip(forward(stayed, 200, 5), forward(moved, 200, 5), strict=True):
        assert all(map(torch.equal, one, other))
    for index in range(LAYERS):
        assert all(map(torch.equal, stayed.materialize(index), moved.materialize(index)))


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_holds_nothing_is_refused(device):
    cache = KVQ()
    forward(cache, 20, 0)
    with pytest.raises(ConfigError, match="device: "):
        cache.move_to(device)
    assert cache.layers[0].device.type == "cpu"


def test_the_compiled_kernel_reads_no_store_that_is_elsewhere(monkeypatch):
    monkeypatch.setattr(kvq.layers.quantized_layer, "choose_store_device", lambda wanted, states: torch.device("meta"))
    layer = KVQLayer(0, KVQ(backend="native").config.for_layer(0))
    layer.update(draw(300, 0), draw(300, 1))
    pair = PackedPair(*(side.view() for _, side in layer.sides()), kernel_cache=layer.kernel_cache)
    request = AttentionRequest(draw(1, 2), pair, None, 1.0)
    assert "another device" in CompiledKernel().why_unsupported(request)


def test_what_kernels_keep_of_brought_layers_is_never_more_than_one_layer(elsewhere, copied):
    cache = KVQ()
    forward(cache, 300, 0)
    for step in range(3):
        for layer_idx, layer in enumerate(cache.layers):
            cache.update(draw(1, step), draw(1, step + 10), layer_idx)
            layer.kernel_cache.kernel_data["a kernel"] = layer.side("key").store.view().segments
            assert [one.layer_idx for one in cache.layers if one.kernel_cache.kernel_data] == [layer_idx]
