"""Invariant 5: nothing ordinary crashes, and what comes back is as near as the bits allow."""

import math
from dataclasses import replace

import pytest
import torch
from drawn_cases import (
    COVERING,
    DTYPES,
    HEAD_DIMS,
    OWN_BACKENDS,
    QUANTIZATIONS,
    Case,
    cases,
    example_count,
    feed,
    pieces,
    splits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq import KVQ
from kvq.plugin_api import Granularity
from kvq.registry import available_backends

AFFINE = [quantization for quantization in QUANTIZATIONS if quantization.is_affine]


def test_every_backend_that_can_be_had_is_among_the_cases():
    covered = {quantization.name for quantization in QUANTIZATIONS}
    ours = {info.name for info in available_backends() if info.origin == "kvq"}
    assert covered >= {"quanto", "hqq", "template", *OWN_BACKENDS, *ours}
    for name in OWN_BACKENDS:
        assert {q.nbits for q in QUANTIZATIONS if q.name == name} == set(
            next(q for q in QUANTIZATIONS if q.name == name).backend.capabilities.nbits
        )


@pytest.mark.parametrize("quantization", COVERING, ids=str)
@settings(max_examples=example_count(4))
@given(data=st.data())
def test_any_length_batch_head_dim_and_dtype(quantization, data):
    case = data.draw(cases(quantization, flushes=(0, 2)))
    states = case.states()
    cache, total = KVQ(case.config(), padding=case.padding), 0
    for piece in pieces(states, data.draw(splits(case.tokens))):
        total += piece[0].shape[2]
        for layer in range(2):
            returned = cache.update(*piece, layer)
            for found, side in zip(returned, states, strict=True):
                assert found.shape == (case.batch, case.heads, total, side.shape[3])
                assert found.dtype == case.dtype
    assert cache.get_seq_length() == total == case.tokens
    for held, side in zip(cache.materialize(1), states, strict=True):
        assert held.isfinite().all()
        assert (held - side).abs().max() <= 3 * side.abs().max()


@pytest.mark.case("head dims from 8 to 576, 67 among them, unlike for keys and values", "works")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [*HEAD_DIMS, (67, 80), (576, 64)], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_every_head_dim_with_every_dtype(dims, dtype, batch):
    cache = KVQ(nbits_k=8, nbits_v=8, residual_length=16)
    keys, values = (torch.randn(batch, 1, 81, dim, generator=torch.Generator().manual_seed(dim)) for dim in dims)
    for start, stop in ((0, 80), (80, 81)):
        cache.update(keys[:, :, start:stop].to(dtype), values[:, :, start:stop].to(dtype), 0)
    for held, states in zip(cache.materialize(0), (keys, values), strict=True):
        assert (held.float() - states).abs().max() <= 8 / 255 + 4 * torch.finfo(dtype).eps


def rotate(states, signs):
    """Apply the signs, then the Hadamard matrix over blocks of the largest power of two in D; fp64."""
    size = states.shape[-1] & -states.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = (states.double() * signs).unflatten(-1, (-1, size))
    return (blocks @ matrix / math.sqrt(size)).flatten(-2)


READ_DTYPES = {torch.float16, torch.float32, torch.uint8, torch.int8}


def groups_of(states, axis, group_size):
    """Split `[B, H, T, D]` into its groups: a list of `[B, H, ..., G]`, the last of which may be shorter."""
    if axis is Granularity.PER_CHANNEL:
        return [states.transpose(-1, -2).unflatten(-1, (-1, group_size))]
    head_dim = states.shape[-1]
    length = math.ceil(head_dim / math.ceil(head_dim / group_size))
    return list(states.split(length, dim=-1))


def is_symmetric(quantization):
    return quantization.name == "template" or dict(quantization.options).get("symmetric_8bit")


def largest_error(quantization, groups):
    """Return the largest error that the words of the backend allow for each group, in exact arithmetic."""
    span, levels = groups.amax(-1) - groups.amin(-1), math.ceil(2**quantization.nbits - 0.01)
    options = dict(quantization.options)
    if is_symmetric(quantization):
        return groups.abs().amax(-1) / (levels - 2)
    if options.get("clip") or (quantization.name == "hqq" and options.get("optimize", True)):
        return span  # outliers may be given up for a smaller mean error
    return span / (levels - 1) / 2


def storing_error(quantization, groups, layout):
    """Return what rounding scale and mid to their dtypes costs at most, and arithmetic in fp32."""
    largest = groups.abs().amax(-1)
    span = 2 * largest if is_symmetric(quantization) else groups.amax(-1) - groups.amin(-1)
    if "units" in layout:
        # A 64th of an octave at the ends of the range, or half of the smallest scale there is beside the largest.
        of_scale = torch.maximum((2 ** (1 / 64) - 1) * span, 2.0**-9 * span.amax())
        return 1.001 * of_scale + (largest.amax() + span) * (0.5 / 127 + 2.0**-20)
    eps = {name: torch.finfo(layout[name].dtype).eps for name in ("scale", "mid")}
    return span * eps["scale"] + (largest + span) * (eps["mid"] / 2 + 2.0**-20)


@pytest.mark.parametrize("quantization", AFFINE, ids=str)
@settings(max_examples=example_count(3))
@given(data=st.data())
def test_the_error_is_at_most_half_a_step(quantization, data):
    assert_within_bounds(replace(data.draw(cases(quantization)), padding=None, sink_length=0))


@pytest.mark.parametrize("axes", [("per_channel", "per_token"), ("per_token", "per_channel")], ids=str)
@pytest.mark.parametrize("head_dim", [9, 67, 80, 100])
@pytest.mark.parametrize("group_size", [24, 32])
def test_a_last_group_that_is_shorter_keeps_its_own_range(head_dim, group_size, axes):
    assert_within_bounds(
        Case(
            quantization=next(q for q in AFFINE if (q.name, q.nbits, q.key_axis) == ("native", 3, axes[0])),
            batch=2,
            heads=2,
            key_dim=head_dim,
            value_dim=head_dim,
            dtype=torch.float32,
            tokens=200,
            residual_length=0,
            sink_length=0,
            padding=None,
            group_sizes=(group_size, group_size),
            rotations=("none", "none"),
            balances=("none", "none"),
            metadata=None,
            magnitude=1.0,
            bias=3.0,
            seed=0,
        )
    )


def assert_within_bounds(case):
    """Assert that what is stored of a case without sinks and padding differs by no more than the backend says."""
    quantization, states = case.quantization, case.states()
    layer = feed(case.layer(), states)
    axes = (quantization.key_axis, quantization.value_axis)
    for axis, group_size, (name, side), given_states in zip(axes, case.group_sizes, layer.sides(), states, strict=True):
        stored = side.store.length
        exact = given_states[:, :, :stored].double()
        error = getattr(layer, f"{name}s")[:, :, :stored].double() - exact
        returned = torch.finfo(case.dtype).eps * exact.abs().amax()
        layout = side.codec.layout()
        assert {layout["scale"].dtype, layout["mid"].dtype} <= READ_DTYPES, "no bfloat16"
        signs = side.codec.constants().get("rotation_signs")
        if signs is not None:
            exact, error = rotate(exact, signs), rotate(error, signs)
            returned = returned * math.sqrt(given_states.shape[3]) + 2.0**-20 * exact.abs().amax()
        factors = torch.ones_like(exact[..., :1])
        if "factor" in layout:
            factors = stored_factors(side)
            assert_even(exact, factors, side.codec.block_length)
        triples = (groups_of(one / factors, axis, group_size) for one in (error, exact, returned.expand_as(exact)))
        for wrong, groups, rounded in zip(*triples, strict=True):
            bound = largest_error(quantization, groups) * 1.001 + storing_error(quantization, groups, layout)
            assert (wrong.abs() <= bound[..., None] + rounded).all(), name


def stored_factors(side):
    """Return the factor of each stored token, fp64 `[B, H, T, 1]`."""
    codes = [segment.read(0, segment.used)["factor"].flatten(2) for segment in side.store.view().segments]
    return (2.0 ** (torch.cat(codes, dim=2).double() / -32))[..., None]


def assert_even(states, factors, length):
    """Assert that factors are the tokens' lengths against the largest of their block, by half a step, or the least."""
    norms = states.norm(dim=-1).unflatten(-1, (-1, length))
    expected = (norms / norms.amax(-1, keepdim=True)).clamp_min(2.0 ** (-255 / 32)).flatten(2)
    wrong = (factors.squeeze(-1).log2() - expected.log2()).abs()
    assert wrong.max() <= 1 / 64 + 1e-5
