"""Layers to attend to, and attention in fp64 over what they give back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from kvq.attention.dispatch.kernel_registry import KernelRegistry, use_kernel_registry
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer
from kvq.testing.case import PLAIN as WITHOUT_STEPS

PLAIN = {"axis_value": "per_token", **WITHOUT_STEPS}
"""Codes of the states themselves, in groups of both directions; a test that is about other codes says so."""
KERNELS = {kernel.name: kernel for kernel in OWN_KERNELS if not kernel.device_types or "cpu" in kernel.device_types}


@pytest.fixture(params=[name for name in KERNELS if name != "blockwise"])
def kernel(request):
    """Each kernel that serves a single query on the CPU."""
    chosen = KERNELS[request.param]
    if (problem := chosen.why_unavailable()) is not None:
        pytest.skip(problem)
    return chosen


@pytest.fixture
def put_kernels():
    """Let attention choose, for one test, from the kernels given, the preferred first, of which nothing is known."""
    with ExitStack() as stack:

        def put(*kernels):
            registry = KernelRegistry(kernels)
            stack.enter_context(use_kernel_registry(registry))
            return registry

        yield put


@pytest.fixture
def make_request(testing_backend):
    """Build a layer and one step on it, always from the same numbers; `make_request.layer` is the last one built."""

    def make(
        *,
        tokens=333,
        queries=1,
        batch=2,
        heads=2,
        sharing=3,
        head_dim=32,
        value_dim=None,
        dtype=torch.float32,
        dtypes=None,
        padding=None,
        rows=None,
        mask=None,
        is_causal=True,
        softcap=None,
        sink_logits=None,
        offset=2.0,
        magnitude=1.0,
        octaves=0.0,
        forgotten=0,
        change=None,
        **config,
    ):
        generator = torch.Generator().manual_seed(3)

        query_dtype, *side_dtypes = dtypes or (dtype, dtype, dtype)

        def draw(count):
            for dim, side_dtype in zip((head_dim, value_dim or head_dim), side_dtypes, strict=True):
                states = torch.randn(batch, heads, count, dim, generator=generator)
                if octaves:  # the powers of two by which the tokens differ in length
                    states *= torch.exp2(octaves * torch.rand(batch, heads, count, 1, generator=generator) - octaves)
                yield ((states + offset * torch.randn(heads, 1, dim, generator=generator)) * magnitude).to(side_dtype)

        fields = {"backend": testing_backend, "nbits_k": 4, "nbits_v": 4, "q_group_size": 32, "residual_length": 64}
        settings = KVQCacheConfig.from_mapping({**fields, **PLAIN, **config}).for_layer(0)
        make.layer = layer = KVQLayer(0, settings, padding)
        keys, values = draw(tokens)
        if change is not None:
            change(keys, values)
        # In three updates, so that there is more than one chunk.
        for start, stop in ((0, 100), (100, 101), (101, tokens)):
            if start < min(stop, tokens):
                layer.update(keys[:, :, start : min(stop, tokens)], values[:, :, start : min(stop, tokens)])
        if rows is not None:
            layer.reorder_cache(torch.tensor(rows))
        for _, side in layer.sides():  # the first chunks, as a layer that slides does
            side.forget_first(forgotten)
            assert side.length == tokens - forgotten
        handle, _ = layer.update(*draw(queries), packed=True)
        query = torch.randn(batch, queries, heads * sharing, head_dim, generator=generator)
        query = query.to(query_dtype).transpose(1, 2)
        return AttentionRequest(query, handle.pair, mask, 0.1 / magnitude, is_causal, softcap, sink_logits)

    return make


def read_in_fp64(side):
    """What a side holds, before it is rounded to the dtype of the states."""
    stored = side.store.length
    states = side.materialize().double()
    side.decode_into(states[:, :, :stored], 0)
    return states


def attend_in_fp64(request):
    """Dequantize, then attend, in fp64: `[B, Tq, Hq, D_v]`."""
    sharing = request.queries_per_head
    keys, values = (
        read_in_fp64(side).repeat_interleave(sharing, dim=1) for side in (request.pair.key, request.pair.value)
    )
    scores = request.query.double() @ keys.transpose(-1, -2) * request.scaling
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if request.mask is None and request.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~seen, -torch.inf)
    elif request.mask is not None and request.mask.dtype == torch.bool:
        scores = scores.masked_fill(~request.mask, -torch.inf)
    elif request.mask is not None:
        scores = scores + request.mask.double()
    if request.sink_logits is not None:
        extra = request.sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return (torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1] @ values).transpose(1, 2)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def relative_error(output, expected):
    """Largest difference as a share of the largest number expected."""
    return ((output.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def reference():
    return attend_in_fp64


@pytest.fixture
def error_of():
    return relative_error
