"""What is saved comes back, bit for bit, in whatever state the cache was, and goes on as if it had never left."""

from __future__ import annotations

import pytest
import torch
from cache_files import SMALL, assert_equal, draw, fill, mixed_cache, sliding_config
from safetensors.torch import load_file

from kvq import KVQ
from kvq.errors import CacheFileError, CacheStateError, ConfigError
from kvq.layers.quantized_layer import KVQLayer

CONFIGS = {
    "default": {},
    "rotated": {"rotation_k": "hadamard", "rotation_v": "hadamard", "nbits_k": 3, "backend": "native"},
    "balanced": {"axis_value": "per_channel", "balance_k": "rms", "balance_v": "rms", "rotation_v": "hadamard"},
    "hqq": {"backend": {"key": "hqq", "value": "native"}, "nbits_v": 5},
    "no sinks, no window": {"sink_length": 0, "residual_length": 0},
    "codebook": {"backend": "norm_codebook", "nbits_v": 4, "residual_length": 128},
    "calibrated": {"backend": "static_float8", "nbits_k": 8, "nbits_v": 8, "residual_length": 128},
    "per layer": {"layers": {"0": {"nbits_k": 8}, "1": {"full_precision": True}}},
}


@pytest.mark.filterwarnings("ignore:nbits_k=4 is below")
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.case(
    "saving a quantized cache of several layers",
    "it comes back and goes on as if nothing had been",
    report="waybarrios/vllm-mlx#451",
)
def test_what_is_loaded_is_what_was_saved_and_goes_on_like_it(fields, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = fill(KVQ(**fields), 400)
    cache.save(path)
    loaded = KVQ.load(path)
    assert loaded.config == cache.config
    assert_equal(loaded, cache)
    for one in (cache, loaded):
        fill(one, 200, seed=50)
        one.crop(-30)
        fill(one, 100, seed=90)
    assert_equal(loaded, cache)
    assert loaded.memory().total_bytes <= cache.memory().total_bytes


def reordered(cache):
    cache.reorder_cache(torch.tensor([1, 1]))


def swapped(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def repeated(cache):
    cache.batch_repeat_interleave(2)


def repeated_and_chosen(cache):
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))


def cropped(cache):
    cache.crop(-70)


def test_what_a_crop_left_of_a_group_comes_back_a_second_time_as_it_was(tmp_path):
    """Without the survivors in the file the second crop would return what was quantized twice."""
    cache = fill(KVQ(nbits_k=2, **SMALL), 200)
    cache.crop(-150)
    survivors = cache.materialize(0)[0][:, :, 32:50]
    fill(cache, 100, seed=3)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors")
    assert not torch.equal(loaded.materialize(0)[0][:, :, 32:50], survivors)  # quantized a second time by now
    for one in (cache, loaded):
        one.crop(-100)
    assert_equal(loaded, cache)
    assert torch.equal(loaded.materialize(0)[0][:, :, 32:50], survivors)


OPERATIONS = {
    operation.__name__: operation for operation in (reordered, swapped, repeated, repeated_and_chosen, cropped)
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_whatever_was_done_to_the_batch_and_the_length(operation, tmp_path):
    cache = fill(KVQ(padding=[40, 0], **SMALL), 150)
    operation(cache)
    batch = cache.materialize(0)[0].shape[0]
    fill(cache, 60, seed=7, batch=batch)  # chunks with another batch order than the first ones
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors")
    assert_equal(loaded, cache)
    for one in (cache, loaded):
        one.reorder_cache(torch.arange(batch).flip(0))
        fill(one, 60, seed=9, batch=batch)
    assert_equal(loaded, cache)
    for name, side in loaded.layers[0].sides():
        assert side.sinks.starts == cache.layers[0].side(name).sinks.starts


def test_chunks_of_a_smaller_batch_are_saved_apart_from_those_of_a_larger_one(tmp_path):
    cache = fill(KVQ(**SMALL), 150)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    fill(cache, 150, seed=7)
    cache.reorder_cache(torch.tensor([0, 0]))  # now all chunks have the same batch order
    cache.save(tmp_path / "cache.safetensors")
    assert_equal(KVQ.load(tmp_path / "cache.safetensors"), cache)


def test_rows_that_nobody_reads_are_not_saved(tmp_path):
    cache = fill(KVQ(**SMALL), 150)
    cache.save(tmp_path / "both.safetensors")
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.save(tmp_path / "one.safetensors")
    both, one = (load_file(tmp_path / f"{name}.safetensors")["layers.0.key.runs.0.codes_4"] for name in ("both", "one"))
    assert torch.equal(one, both[1:])


def test_layers_that_the_model_keeps_sliding(tmp_path):
    cache = mixed_cache()
    cache.save(tmp_path / "cache.safetensors")
    for model in (None, sliding_config()):
        loaded, original = KVQ.load(tmp_path / "cache.safetensors", model=model), mixed_cache()
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in original.layers]
        assert not isinstance(loaded.layers[1], KVQLayer)
        assert loaded.layers[1].get_mask_sizes(1) == original.layers[1].get_mask_sizes(1)
        for one in (loaded, original):
            fill(one, 70, seed=40)
        assert_equal(loaded, original)


def test_a_fork_and_what_it_was_forked_from_are_saved_apart(tmp_path):
    cache = fill(KVQ(**SMALL), 150)
    fork = cache.fork()
    fill(fork, 50, seed=11)
    cache.save(tmp_path / "cache.safetensors")
    fork.save(tmp_path / "fork.safetensors")
    fill(cache, 50, seed=12)
    assert_equal(KVQ.load(tmp_path / "fork.safetensors"), fork)
    loaded = KVQ.load(tmp_path / "cache.safetensors")
    assert loaded.get_seq_length() == 150
    forks = [loaded.fork(), loaded.fork()]
    for seed, one in enumerate(forks):
        fill(one, 50, seed=11 + seed)
    assert_equal(forks[0], fork)
    assert_equal(forks[1], cache)
    assert loaded.get_seq_length() == 150


def test_the_same_cache_makes_the_same_file_and_a_loaded_one_too(tmp_path):
    cache = fill(KVQ(**SMALL), 150)
    contents = []
    for name in "abc":
        cache.save(tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
        cache = KVQ.load(tmp_path / name)
    assert contents[0] == contents[1] == contents[2]


def test_token_ids_and_padding_come_back(tmp_path):
    cache = fill(KVQ(padding=[5, 0]), 20)
    token_ids = torch.arange(42).reshape(2, 21)
    cache.save(tmp_path / "cache.safetensors", token_ids=token_ids)
    loaded = KVQ.load(tmp_path / "cache.safetensors")
    assert torch.equal(loaded.token_ids, token_ids)
    assert torch.equal(loaded.fork().token_ids, token_ids)
    assert loaded.layers[0].padding == (5, 0)
    with pytest.raises(CacheStateError, match="no fewer than the 20 tokens"):
        cache.save(tmp_path / "cache.safetensors", token_ids=token_ids[:, :19])


def test_a_device_of_the_type_of_the_states_stays_with_them(tmp_path):
    cache = fill(KVQ(device="cpu"), 20)
    cache.save(tmp_path / "cache.safetensors")
    assert KVQ.load(tmp_path / "cache.safetensors").config == cache.config.replace(device=None)


def test_what_cannot_be_saved_is_refused(tmp_path, testing_backend):
    import dataclasses

    path = tmp_path / "cache.safetensors"
    unnamed = fill(KVQ(backend=dataclasses.replace(testing_backend, summary="another"), **SMALL), 20)
    with pytest.raises(ConfigError, match="given as an object, which no file can hold"):
        unnamed.save(path)
    uneven = fill(KVQ(**SMALL), 20)
    uneven.update(draw(1), draw(1), 0)
    with pytest.raises(CacheStateError, match="a forward was cut short"):
        uneven.save(path)
    uneven.layers[1] = object()
    with pytest.raises(CacheStateError, match="layer 1 is a object, whose states no file"):
        uneven.save(path)
    with pytest.raises(CacheFileError, match="cannot be written"):
        fill(KVQ(**SMALL), 20).save(tmp_path / "nowhere" / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_counted_from_the_end_needs_the_model(tmp_path):
    cache = fill(KVQ(model=sliding_config(layer_types=["full_attention"] * 2), layers={"last:1": {"nbits_k": 8}}), 200)
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ConfigError, match="pass `model=`"):
        KVQ.load(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors", model=sliding_config(layer_types=["full_attention"] * 2))
    assert_equal(loaded, cache)


KNOWN_STATE = {
    "KVQLayer": {
        "_sides", "device", "dtype", "is_initialized", "layer_idx", "padding", "settings",
        "kernel_cache",  # what kernels keep in this process
        "carried",  # saved beside the sides
        "evicted_length", "firm_length", "_assigned", "_rewritten",  # a cache with evicted tokens is refused
        "flush_delay",  # of the index
        "_records_past",  # asked for by each `generate` that needs it
    },
    "LayerSide": {"flush_length", "contents"},
    "SideContents": {
        "store", "window", "sinks", "cropped",
        "dropped",
        "length", "seen",  # found from store and window
    },
    "ChunkedStore": {
        "writer", "batch_size", "segments",
        "blocks", "length", "seen",  # found from the segments
        "owns_last", "prefetched",  # what is loaded is owned, and read from where it is
    },
    "ChunkWriter": {
        "codec", "num_heads", "device", "pinned", "block_length", "layout",
        "chunk_lengths",  # of the window, which a file tells
    },
    "TokenBuffer": {
        "buffer", "length", "step",
        "is_refilled",  # by steps at fixed addresses, which are of this process
    },
    "SinkTokens": {"length", "starts", "states"},
    "CroppedGroups": {"groups"},
}  # fmt: skip
"""What a layer is made of, all of which a file tells or the configuration: a new attribute asks for its place."""


def test_no_state_of_a_layer_is_forgotten():
    layer = fill(KVQ(), 300).layers[0]
    side = layer.side("key")
    held = side.contents
    for part in (layer, side, held, held.store, held.store.writer, held.window, held.sinks, held.cropped):
        assert set(vars(part)) == KNOWN_STATE[type(part).__name__]


def test_any_reader_of_safetensors_reads_the_file(tmp_path):
    cache = fill(KVQ(), 400)
    cache.save(tmp_path / "cache.safetensors")
    tensors = load_file(tmp_path / "cache.safetensors")
    assert torch.equal(
        tensors["layers.0.key.window"], cache.materialize(0)[0][:, :, -tensors["layers.0.key.window"].shape[2] :]
    )


def test_an_empty_cache_is_not_saved(tmp_path):
    with pytest.raises(CacheStateError, match="holds no tokens"):
        KVQ().save(tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_is_seen(tmp_path):
    path = tmp_path / "cache.safetensors"
    fill(KVQ(), 200).save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheFileError, match="damaged or changed"):
        KVQ.load(path)


def test_a_sliding_layer_that_records_is_saved_as_one_that_goes_on(tmp_path):
    config, window = sliding_config(sliding_window=16), 16
    cache = KVQ(model=config, residual_length=8)
    cache.activate_past_recording()
    fill(cache, 100)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQ.load(tmp_path / "cache.safetensors", model=config)
    assert loaded.layers[1].keys.shape[2] == window - 1
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys[:, :, -(window - 1) :])
    assert loaded.get_mask_sizes(1, 1) == (window, 100 - window + 1)
    loaded.update(draw(1), draw(1), 0)
    keys, _ = loaded.update(draw(1), draw(1), 1)
    assert keys.shape[2] == window
    assert [layer.get_seq_length() for layer in loaded.layers] == [101, 101]
