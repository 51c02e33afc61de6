"""What is saved comes back, bit for bit, in whatever state the cache was, and goes on as if it had never left."""

from __future__ import annotations

import pytest
import torch
from reference_quantizers import NORM_CODEBOOK, STATIC_FLOAT8
from safetensors.torch import load_file

from kvq import KVQ
from kvq.errors import CacheFileError, CacheStateError
from kvq.registry import register_backend


@pytest.fixture(autouse=True)
def reference_backends():
    for spec in (NORM_CODEBOOK, STATIC_FLOAT8):
        register_backend(spec, replace=True)


def states(length, *, batch=2, heads=2, head_dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)


def fill(cache, length, *, layers=2, seed=0, **shape):
    for layer in range(layers):
        keys, values = (states(length, seed=seed + 2 * layer + side, **shape) for side in (0, 1))
        cache.update(keys, values, layer)
    return cache


def assert_equal(one, other):
    assert len(one.layers) == len(other.layers)
    for index in range(len(one.layers)):
        for left, right in zip(one.materialize(index), other.materialize(index), strict=True):
            assert left.dtype is right.dtype
            assert torch.equal(left, right)


CONFIGS = {
    "default": {},
    "rotated": {"rotation_k": "hadamard", "rotation_v": "hadamard", "nbits_k": 3, "backend": "native"},
    "hqq": {"backend": {"key": "hqq", "value": "native"}, "nbits_v": 5},
    "no sinks, no window": {"sink_length": 0, "residual_length": 0},
    "codebook": {"backend": "norm_codebook", "nbits_v": 4},
    "calibrated": {"backend": "static_float8", "nbits_k": 8, "nbits_v": 8},
    "per layer": {"layers": {"0": {"nbits_k": 8}, "1": {"full_precision": True}}},
}


@pytest.mark.filterwarnings("ignore:nbits_k=4 is below")
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
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
