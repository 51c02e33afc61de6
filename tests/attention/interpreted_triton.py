"""Run the Triton programs on the CPU, by Triton's interpreter, and print their errors as JSON.

A process of its own with TRITON_INTERPRET=1, since that is read when the programs are imported. Expected values are
those of attention by its definition, in float64, over the dequantized states.
"""

from __future__ import annotations

import json

import torch
from codebook_groups import spec_of as codebook_of
from summed_channels import Residual, spec_of
from torch.nn import functional

from kvq import KVQ, KVQCacheConfig
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.testing.case import PLAIN as WITHOUT_STEPS

CPU = torch.device("cpu")
PLAIN = {"axis_value": "per_token", **WITHOUT_STEPS, "residual_length": 128}
"""What a case has that says nothing else: codes of the states themselves."""
DEFAULTS = {name: KVQCacheConfig.model_fields[name].default for name in PLAIN}
SUMS = {"backend": spec_of(Residual), "axis_value": "per_channel", "nbits_k": 2, "nbits_v": 2}
LEVELS = {"backend": codebook_of(), "nbits_v": 4}
CASES = {
    "plain": {},
    "defaults": DEFAULTS,
    "defaults, head dim 80": {**DEFAULTS, "head_dim": 80},
    **{f"{bits} bit": {"nbits_k": bits, "nbits_v": bits} for bits in range(2, 9)},
    "per token": {"axis_key": "per_token"},
    "per channel": {"axis_value": "per_channel"},
    "one scale per token": {"axis_key": "per_token", "q_group_size": 128},
    "several scales per token": {"axis_key": "per_token", "q_group_size": 32, "nbits_v": 4},
    "short groups": {"q_group_size": 32, "nbits_v": 4},
    "rotated": {"rotation_k": "hadamard", "rotation_v": "hadamard"},
    "balanced": {"axis_value": "per_channel", "balance_k": "rms", "balance_v": "rms"},
    "balanced and rotated": {
        "axis_value": "per_channel",
        "balance_k": "rms",
        "balance_v": "rms",
        "rotation_k": "hadamard",
        "rotation_v": "hadamard",
    },
    "metadata in bytes": {**DEFAULTS, "metadata_dtype": "int8"},
    "metadata in bytes, head dim 80": {**DEFAULTS, "metadata_dtype": "int8", "head_dim": 80},
    "metadata in bytes, one scale per token": {"metadata_dtype": "int8", "axis_key": "per_token", "q_group_size": 128},
    "metadata in bytes, several scales per token": {"metadata_dtype": "int8", "axis_key": "per_token", "nbits_v": 4},
    "batch": {"batch": 3},
    "no shared heads": {"groups": 1},
    "eight queries a head": {"groups": 8},
    "more queries than a program takes": {"groups": 12},
    "more queries than a program takes, padding": {"groups": 5, "queries": 7, "batch": 2, "padding": (5, 0)},
    "more queries than a program takes, float16": {"groups": 5, "queries": 7, "dtype": torch.float16},
    "head dim 80": {"head_dim": 80},
    "head dim 256": {"head_dim": 256, "tokens": 270},
    "other head dim of the values": {"head_dim": 64, "value_dim": 32},
    "many chunks": {"pieces": 11, "tokens": 403},
    "no sinks": {"sink_length": 0},
    "sinks and store alone": {"residual_length": 0, "tokens": 512},
    "some of the sinks stored": {
        "sink_length": 40,
        "q_group_size": 32,
        "nbits_v": 4,
        "residual_length": 64,
        "tokens": 110,
    },
    "some of the sinks forgotten": {"batch": 2, "padding": (62, 3), "sink_length": 5, "pieces": 11, "forgotten": 64},
    "long window": {"residual_length": 256, "tokens": 403},
    "several queries": {"queries": 3},
    "padding": {"batch": 2, "padding": (0, 37)},
    "padding up to the last stored tokens": {"batch": 2, "padding": (62, 63), "tokens": 200},
    "padding and several queries": {"batch": 2, "padding": (5, 0), "queries": 3},
    "softcap": {"softcap": 5.0},
    "sink logits": {"logits": True},
    "reordered rows": {"batch": 3, "rows": (2, 0, 0)},
    "float16": {"dtype": torch.float16},
    "half-width values": {"dtypes": (torch.float32, torch.float32, torch.float16)},
    "half-width keys": {"dtypes": (torch.float32, torch.float16, torch.float32), "sink_length": 3},
    "half-width query, float16": {"dtypes": (torch.float16, torch.float32, torch.float32)},
    "large numbers": {"factor": 1e6},
    "sums of channels": SUMS,
    **{
        f"codebook of {2**bits}, {axis}": {**LEVELS, "nbits_k": bits, "axis_key": axis, "axis_value": axis}
        for bits, axis in ((1, "per_token"), (3, "per_channel"), (4, "per_token"), (8, "per_channel"))
    },
    "codebook, one scale per token": {**LEVELS, "axis_key": "per_token", "q_group_size": 64},
    "codebook, head dim 80, rotated": {**LEVELS, "head_dim": 80, "rotation_k": "hadamard", "rotation_v": "hadamard"},
    "codebook of the values, several rows": {
        **LEVELS,
        "backend": {"key": "native", "value": codebook_of()},
        "groups": 6,
        "queries": 3,
    },
    "sums of channels, several rows": {**SUMS, "batch": 2, "queries": 3, "groups": 6, "sink_length": 3},
}


def build_request(
    batch=1, heads=2, groups=4, head_dim=64, value_dim=None, tokens=275, pieces=1, queries=1, padding=None,
    softcap=None, logits=False, rows=None, dtype=torch.float32, dtypes=None, factor=1.0, forgotten=0,
    device=CPU, **fields,
):  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    query_dtype, key_dtype, value_dtype = dtypes or (dtype, dtype, dtype)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    def new_states(count):
        keys = draw(batch, heads, count, head_dim) + means
        values = draw(batch, heads, count, value_dim or head_dim)
        return (keys * factor).to(key_dtype), (values * factor).to(value_dtype)

    means = 2 * draw(1, heads, 1, head_dim)
    cache = KVQ({"backend": "native", **PLAIN, **fields}, padding=padding)
    for piece in torch.arange(tokens).tensor_split(pieces):
        cache.update(*new_states(len(piece)), 0)
    if rows is not None:
        cache.layers[0].reorder_cache(torch.tensor(rows))
    for _, side in cache.layers[0].sides():  # the first chunks, as a layer that slides does
        side.forget_first(forgotten)
        assert side.length == tokens - forgotten
    pair = cache.layers[0].update(*new_states(queries), packed=True)[0].pair
    query = (draw(batch, heads * groups, queries, head_dim) / factor).to(query_dtype)
    return AttentionRequest(
        query,
        pair,
        None if padding is None or forgotten else make_mask(padding, queries, tokens + queries).to(device),
        scaling=head_dim**-0.5,
        softcap=softcap,
        sink_logits=draw(heads * groups) if logits else None,
    )


def make_mask(padding, queries, length):
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    real = torch.arange(length) >= torch.tensor(padding)[:, None]
    return causal & real[:, None, None]


def read_exactly(side):
    """What a side holds, before it is rounded to the dtype of the states."""
    states = side.materialize().double()
    side.decode_into(states[:, :, : side.store.length], 0)
    return states


def attend_exactly(request):
    keys, values = read_exactly(request.pair.key), read_exactly(request.pair.value)
    keys, values = (states.repeat_interleave(request.queries_per_head, dim=1) for states in (keys, values))
    scores = request.query.double() @ keys.transpose(-1, -2) * request.scaling
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    seen = request.mask
    if seen is None:
        queries, length = scores.shape[-2:]
        seen = torch.ones(queries, length, dtype=torch.bool, device=scores.device).tril(length - queries)
    scores = scores.masked_fill(~seen, -torch.inf)
    if request.sink_logits is not None:
        extra = request.sink_logits.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = functional.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    else:
        weights = functional.softmax(scores, dim=-1)
    return (weights @ values).transpose(1, 2)


def measure(fields, device=CPU):
    request = build_request(device=device, **fields)
    obstacle = TRITON.why_unsupported(request)
    if obstacle is not None:
        return obstacle
    output, expected = TRITON.attend(request), attend_exactly(request)
    assert output.dtype == request.query.dtype
    assert output.shape == expected.shape
    return ((output.double() - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: measure(fields) for name, fields in CASES.items()}))
