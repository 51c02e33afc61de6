"""Caches to save, and what the tests of files ask of them."""

from __future__ import annotations

import torch
from transformers import FalconH1Config, GlmMoeDsaConfig, MistralConfig

from kvq import KVQ

HEADS, HEAD_DIM = 2, 16
SMALL = {"q_group_size": 16, "residual_length": 16}
"""A store soon, and little of it: a file of some kilobytes."""


def draw(length, *, batch=2, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)


def fill(cache, length, *, layers=2, seed=0, **shape):
    """Feed all layers of a cache random states, as one forward does."""
    for layer in range(layers):
        keys, values = (draw(length, seed=seed + 2 * layer + side, **shape) for side in (0, 1))
        cache.update(keys, values, layer)
    return cache


def assert_equal(one, other):
    """Check that two caches return the same states, bit for bit."""
    assert len(one.layers) == len(other.layers)
    assert one.get_seq_length() == other.get_seq_length()
    for index in range(len(one.layers)):
        for left, right in zip(one.materialize(index), other.materialize(index), strict=True):
            assert left.dtype is right.dtype
            assert torch.equal(left, right)


def sliding_config(**fields):
    """A model with full and sliding attention in turn, whose sliding layers a cache keeps."""
    return MistralConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        **{
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 50,
            **fields,
        },
    )


def mixed_cache():
    """Two layers, the second sliding and kept in full precision; padded and reordered half way."""
    cache = KVQ({"nbits_v": 4, "backend": "native", **SMALL}, model=sliding_config(), padding=[3, 0])
    fill(cache, 70)
    cache.reorder_cache(torch.tensor([1, 1]))
    return fill(cache, 50, seed=20)


def window_cache():
    """Two layers, the second sliding and quantized; of one row it has forgotten all sinks, of the other two of four."""
    config = {"nbits_v": 4, "backend": "native", "sliding": "quantize", **SMALL}
    return fill(KVQ(config, model=sliding_config(sliding_window=40), padding=[30, 0]), 75)


def hybrid_cache():
    """One layer with linear and full attention in it."""
    config = FalconH1Config(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    cache = fill(KVQ(model=config, **SMALL), 40, layers=1)
    cache.update_conv_state(draw(4), 0)
    cache.update_recurrent_state(draw(3, seed=1), 0)
    return cache


def indexed_cache():
    """One layer with an indexer."""
    cache = fill(KVQ(model=GlmMoeDsaConfig(num_hidden_layers=1), **SMALL), 40, layers=1)
    cache.update_indexer(draw(40)[:, 0], 0)
    return cache


def opaque_cache():
    """Two quantizers that are not affine, one of them calibrated; the second layer in full precision."""
    fields = {"nbits_k": 4, "nbits_v": 8, "layers": {"1": {"full_precision": True}}, **SMALL}
    return fill(KVQ(backend={"key": "norm_codebook", "value": "static_float8"}, **fields), 80)


def rotated_cache():
    """One layer, rotated, without sinks, by a vendor's library; cropped into its store."""
    cache = fill(KVQ(backend="quanto", rotation_k="hadamard", sink_length=0, **SMALL), 100, layers=1)
    cache.crop(-60)
    return fill(cache, 60, layers=1, seed=30)
