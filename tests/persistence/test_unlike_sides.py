"""Keys and values of unlike dtypes, as a model under autocast hands them to its cache."""

from __future__ import annotations

import json

import pytest
import torch
from cache_files import HEAD_DIM, HEADS, SMALL, assert_equal, draw, sliding_config
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQ

PAIRS = {
    "keys float32, values bfloat16": (torch.float32, torch.bfloat16),
    "keys float32, values float16": (torch.float32, torch.float16),
    "keys bfloat16, values float32": (torch.bfloat16, torch.float32),
    "keys float16, values bfloat16": (torch.float16, torch.bfloat16),
}
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
each_pair = pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)


def fill(cache, length, dtypes, *, layers=2, seed=0):
    for layer in range(layers):
        keys, values = (draw(length, dtype=dtype, seed=seed + 2 * layer + i) for i, dtype in enumerate(dtypes))
        cache.update(keys, values, layer)
    return cache


def dtypes_of(cache):
    return {tuple(states.dtype for states in cache.materialize(layer)) for layer in range(len(cache.layers))}


@pytest.mark.case("`torch.autocast`: keys float32, values bfloat16", "`save` and `load` keep each side's dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_prefill_under_autocast_comes_back_and_generates_on(dtype, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 120))
    cache = KVQ(model=model, **SMALL)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        model(ids, past_key_values=cache)
        assert dtypes_of(cache) == {(torch.float32, dtype)}, "autocast no longer parts the two"
        cache.save(tmp_path / "cache.safetensors")
        loaded = KVQ.load(tmp_path / "cache.safetensors", model=model)
        assert_equal(loaded, cache)
        whole = torch.cat([ids, ids[:, :1]], dim=1)
        texts = [
            model.generate(whole, past_key_values=one, max_new_tokens=30, do_sample=False, pad_token_id=0)
            for one in (cache, loaded)
        ]
    assert torch.equal(*texts)
    assert len(set(texts[0][0, 121:].tolist())) >= 8, "a text this simple proves nothing"


@each_pair
def test_what_is_loaded_goes_on_like_what_was_saved(dtypes, tmp_path):
    cache = fill(KVQ(padding=[20, 0], rotation_k="hadamard", **SMALL), 150, dtypes)
    cache.crop(-70)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors")
    for one in (cache, loaded):
        assert dtypes_of(one) == {dtypes}
        fill(one, 60, dtypes, seed=9)
        one.crop(-40)
    assert_equal(loaded, cache)


@each_pair
def test_layers_that_transformers_keeps(dtypes, tmp_path):
    """Some releases of transformers give both sides of its layers one dtype; what they hold is what comes back."""
    cache = fill(KVQ(model=sliding_config(), **SMALL), 70, dtypes)
    cache.save(tmp_path / "cache.safetensors")
    for model in (None, sliding_config()):
        loaded = KVQ.load(tmp_path / "cache.safetensors", model=model)
        assert_equal(loaded, cache)
        fill(loaded, 20, dtypes, seed=5)
        assert_equal(loaded, fill(cache.fork(), 20, dtypes, seed=5))


@each_pair
def test_each_side_keeps_its_dtype_through_every_operation(dtypes):
    cache = fill(KVQ(**SMALL), 150, dtypes)
    cache.move_to("cpu")
    moved = cache.layers[0].moved_to(torch.device("cpu"))
    assert (moved.keys.dtype, moved.values.dtype) == dtypes
    fork = fill(cache.fork(), 20, dtypes, seed=4)
    for layer in fork.layers:
        layer.offload()
        layer.prefetch()
        assert (layer.dtype, layer.side("value").dtype) == dtypes
    fork.crop(-90)
    fork.batch_repeat_interleave(2)
    fork.batch_select_indices(torch.tensor([3, 0]))
    for one in (cache, fork):
        assert dtypes_of(one) == {dtypes}
    fork.reset()
    fill(fork, 40, dtypes[::-1])
    assert dtypes_of(fork) == {dtypes[::-1]}


@each_pair
def test_the_memory_report_counts_each_side_by_its_own_element(dtypes):
    memory = fill(KVQ(**SMALL), 40, dtypes, layers=1).memory()
    elements = 2 * HEADS * 40 * HEAD_DIM
    assert memory.full_precision_bytes == elements * (BYTES[dtypes[0]] + BYTES[dtypes[1]])
    key, value = memory.layers[0].key, memory.layers[0].value
    assert key.window_bytes * BYTES[dtypes[1]] == value.window_bytes * BYTES[dtypes[0]] > 0


def test_a_file_of_like_sides_is_of_the_first_version_and_says_nothing_more(tmp_path):
    """Releases that know no second dtype go on reading it."""
    path = tmp_path / "cache.safetensors"
    found = []
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        fill(KVQ(**SMALL), 60, dtypes).save(path)
        data = path.read_bytes()
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        states = [layer["states"] for layer in json.loads(facts["cache"])["layers"]]
        found.append((facts["format_version"], [(one["dtype"], one.get("value_dtype", "left out")) for one in states]))
    assert found == [("1", [("bfloat16", "left out")] * 2), ("2", [("float32", "bfloat16")] * 2)]


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_that_is_stored(dtype, inner, tmp_path):
    """Also float16 states, which autocast to bfloat16 on a processor refuses to concatenate."""
    found = []
    for casts in (False, True):
        cache = KVQ(backend={"key": "quanto", "value": "norm_codebook"}, nbits_v=4, rotation_k="hadamard", **SMALL)
        with torch.autocast("cpu", inner, enabled=casts):
            for seed in range(4):
                fill(cache, 37, (dtype, dtype), seed=10 * seed)
            cache.crop(-25)
            path = tmp_path / f"{casts}.safetensors"
            cache.save(path)
            assert_equal(KVQ.load(path), cache)
            found.append((path.read_bytes(), [*cache.materialize(0), *cache.materialize(1)]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
