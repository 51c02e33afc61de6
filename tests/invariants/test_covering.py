"""The few quantizations that stand for all: they differ in all that an invariant can see."""

import torch
from drawn_cases import COVERING, QUANTIZATIONS

from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer


def facts_of(quantization, side):
    """Return what there is to see of one side: part names and dtypes, direction, locality, and whose code it is."""
    config = KVQCacheConfig(
        backend=quantization.backend,
        nbits_k=quantization.nbits,
        nbits_v=quantization.nbits,
        axis_key=quantization.key_axis,
        axis_value=quantization.value_axis,
        backend_options={quantization.name: dict(quantization.options)} if quantization.options else {},
    )
    layer = KVQLayer(0, config.for_layer(0))
    layer.update(*torch.randn(2, 1, 1, 1, 64))
    codec = layer.side(side).codec
    axis = quantization.key_axis if side == "key" else quantization.value_axis
    yield "backend", quantization.name
    yield "options", quantization.name, quantization.options
    yield "whole bits", quantization.name, float(quantization.nbits).is_integer()
    yield "locality", codec.group_local, side, axis if quantization.is_affine else None
    for name, part in codec.layout().items():
        yield "part", name, part.dtype, axis if quantization.is_affine and "_" in name else None


def seen_in(quantizations):
    return {
        fact for quantization in quantizations for side in ("key", "value") for fact in facts_of(quantization, side)
    }


def test_what_is_seen_of_all_is_seen_of_the_few():
    assert seen_in(COVERING) == seen_in(QUANTIZATIONS)
    assert len(COVERING) < len(QUANTIZATIONS) / 3
