"""The hqq backend against hqq's public `Quantizer`."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hqq.core.quantize import Quantizer

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.plugin_api import AffineQuantizer
from kvq.registry import get_registry
from kvq_backends.hqq import plugin

LENGTHS = (40, 48, 64, 80, 96)
ORDINARY = ("random", "outlier", "offset")
VARIED = (*ORDINARY, "tiny", "huge")
BACKEND = plugin.kvq_backend()
NBITS = BACKEND.capabilities.nbits


def vendor(groups, nbits, *, optimize):
    """Return hqq's codes and dequantized values for groups [N, G]."""
    codes, meta = Quantizer.quantize(
        groups, nbits=nbits, group_size=groups.shape[-1], axis=1, optimize=optimize, bitpack=False, device="cpu"
    )
    return codes, Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})


def powers_above_range(groups):
    """Return for each group the power of two that brings its range into [0.5, 1), fp32 [N, 1]."""
    ranges = (groups.amax(-1) - groups.amin(-1)).tolist()
    return torch.tensor([[2.0 ** math.frexp(extent)[1]] for extent in ranges])


def step_of(groups, nbits):
    """Return the distance of two levels between the extremes, from fp64."""
    exact = groups.double()
    return (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / round(2**nbits - 1)


def loss(decoded, groups):
    """Return the mean of |error| ** 0.7, which hqq minimizes, for groups brought to a standard deviation of 1."""
    error = (decoded - groups).double() / groups.double().std(-1, keepdim=True)
    return float(error.abs().pow(0.7).mean())


@pytest.fixture
def in_half_precision(monkeypatch):
    """Let hqq's optimizer compute in float16 on the CPU, as it does on CUDA, and tell our quantizer."""
    monkeypatch.setattr("hqq.core.optimize.float32", torch.float16)
    monkeypatch.setattr(
        "kvq_backends.hqq.quantizer.HQQQuantizer._get_working_dtype", lambda _self, _device: torch.float16
    )


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("optimize", [True, False])
def test_ordinary_groups_equal_vendor(
    make_groups, build_quantizer, decode, is_close_to_vendor, kind, length, nbits, optimize
):
    groups = make_groups(kind, length)
    encoded = build_quantizer(BACKEND, nbits, optimize=optimize).encode(groups)
    codes, values = vendor(groups, nbits, optimize=optimize)
    assert torch.equal(encoded[0], codes.to(torch.uint8))
    assert is_close_to_vendor(groups, decode(*encoded), values)


@pytest.mark.parametrize("kind", ["tiny", "huge"])
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("optimize", [True, False])
def test_extreme_groups_equal_vendor_in_a_unit_of_their_own(
    make_groups, build_quantizer, decode, is_close_to_vendor, kind, nbits, optimize
):
    groups = make_groups(kind, 80)
    units = powers_above_range(groups)
    encoded = build_quantizer(BACKEND, nbits, optimize=optimize).encode(groups)
    codes, values = vendor(groups / units, nbits, optimize=optimize)
    assert torch.equal(encoded[0], codes.to(torch.uint8))
    assert is_close_to_vendor(groups, decode(*encoded), values * units)


def test_vendor_alone_takes_tiny_groups_for_constant(make_groups):
    # Why the quantizer has frames; should a release of hqq repair this, they can go.
    groups = make_groups("tiny", 80)
    codes, _ = vendor(groups, 4, optimize=False)
    assert not codes.any()


@pytest.mark.parametrize("kind", [*VARIED, "constant"])
@pytest.mark.parametrize("nbits", NBITS)
def test_error_without_optimizer_is_at_most_half_a_step(
    make_groups, build_quantizer, decode, is_within_half_step, check_encoded, kind, nbits
):
    groups = make_groups(kind, 80)
    encoded = build_quantizer(BACKEND, nbits, optimize=False).encode(groups)
    check_encoded(groups, nbits, encoded)
    assert is_within_half_step(groups, decode(*encoded), step_of(groups, nbits))
    if kind != "constant":
        one_bit_fewer = (encoded[0] & 0xFE, *encoded[1:])
        assert not is_within_half_step(groups, decode(*one_bit_fewer), step_of(groups, nbits))


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_nearly_constant_groups_far_from_zero_keep_the_bound(
    make_groups, build_quantizer, decode, is_within_half_step, nbits
):
    groups = 10 + 1e-5 * make_groups("random", 64)
    encoded = build_quantizer(BACKEND, nbits, optimize=False).encode(groups)
    assert is_within_half_step(groups, decode(*encoded), step_of(groups, nbits))
    _, values = vendor(groups, nbits, optimize=False)
    assert not is_within_half_step(groups, values, step_of(groups, nbits))


def test_narrow_groups_keep_the_bound_where_hqq_clamps_its_scale(
    make_groups, build_quantizer, decode, is_within_half_step
):
    groups = 1e-3 * make_groups("random", 64)
    encoded = build_quantizer(BACKEND, 8, optimize=False).encode(groups)
    assert is_within_half_step(groups, decode(*encoded), step_of(groups, 8))
    _, values = vendor(groups, 8, optimize=False)
    assert not is_within_half_step(groups, values, step_of(groups, 8))


def test_neighbouring_numbers_far_from_zero_come_back_exactly(build_quantizer, decode):
    groups = (11 + 2.0**-20 * torch.arange(11, dtype=torch.float64)).float()[None]
    assert len(groups.unique()) == 11
    encoded = build_quantizer(BACKEND, 8, optimize=False).encode(groups)
    assert torch.equal(decode(*encoded), groups)
    in_units = groups * 2.0**20
    _, values = vendor(in_units, 8, optimize=False)
    assert not torch.equal(values, in_units)


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("nbits", NBITS)
def test_optimizer_lowers_the_mean_error(make_groups, build_quantizer, decode, check_encoded, kind, nbits):
    groups = make_groups(kind, 64, count=256)
    optimized = build_quantizer(BACKEND, nbits, optimize=True).encode(groups)
    check_encoded(groups, nbits, optimized)
    plain_loss = loss(decode(*build_quantizer(BACKEND, nbits, optimize=False).encode(groups)), groups)
    assert loss(decode(*optimized), groups) <= plain_loss
    if nbits > 1 and kind != "outlier":  # beside an outlier the optimizer can gain more than a bit
        fewer = build_quantizer(BACKEND, NBITS[NBITS.index(nbits) - 1], optimize=True).encode(groups)
        assert loss(decode(*fewer), groups) > plain_loss


@pytest.mark.parametrize("optimize", [True, False])
def test_every_width_round_trips_with_falling_error(make_groups, build_quantizer, decode, optimize):
    groups = make_groups("random", 64, count=256)
    errors = []
    for nbits in NBITS:
        encoded = build_quantizer(BACKEND, nbits, optimize=optimize).encode(groups)
        assert len(encoded[0].unique()) == round(2**nbits)
        errors.append(float((decode(*encoded) - groups).abs().mean()))
    assert all(more < 0.8 * fewer for fewer, more in pairwise(errors))


def test_listed_widths_are_those_of_the_library():
    assert set(NBITS) == set(Quantizer.SUPPORTED_BITS)


@pytest.mark.parametrize("nbits", [7, 1.5, 16])
def test_unlisted_width_is_refused(nbits):
    with pytest.raises(
        ConfigError, match=r"nbits_k: .* is not supported .*'hqq'; choose one of 1, 1\.58, 2, 3, 4, 5, 6, 8$"
    ):
        KVQCacheConfig(backend="hqq", nbits_k=nbits)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("nbits", NBITS)
def test_constant_groups_have_scale_zero(make_groups, build_quantizer, decode, nbits, optimize):
    groups = make_groups("constant", 48)
    codes, scale, offset = build_quantizer(BACKEND, nbits, optimize=optimize).encode(groups)
    assert not scale.any()
    assert not codes.any()
    assert torch.equal(decode(codes, scale, offset), groups)


@pytest.mark.parametrize("optimize", [True, False])
def test_constant_groups_do_not_disturb_their_neighbours(make_groups, build_quantizer, optimize):
    groups = torch.cat([make_groups("random", 64, count=32), make_groups("constant", 64, count=32)])
    codes, _, _ = build_quantizer(BACKEND, 2, optimize=optimize).encode(groups)
    expected, _ = vendor(groups.clamp(-100, 100), 2, optimize=optimize)
    assert torch.equal(codes, expected.to(torch.uint8))


@pytest.mark.parametrize("nbits", NBITS)
def test_range_past_the_largest_fp32_stays_finite(make_groups, build_quantizer, check_encoded, nbits):
    groups = make_groups("random", 64).clamp(-4, 4) * 8e37
    assert not (groups.amax(-1) - groups.amin(-1)).isfinite().all()
    for optimize in (True, False):
        check_encoded(groups, nbits, build_quantizer(BACKEND, nbits, optimize=optimize).encode(groups))


@pytest.mark.parametrize("nbits", NBITS)
def test_a_group_alone_equals_its_row_without_optimizer(make_groups, build_quantizer, nbits):
    quantizer = build_quantizer(BACKEND, nbits, optimize=False)
    assert quantizer.group_local is True
    groups = torch.cat([make_groups(kind, 40, count=4) for kind in (*VARIED, "constant")])
    batch = quantizer.encode(groups)
    for row in range(len(groups)):
        alone = quantizer.encode(groups[row : row + 1])
        assert all(torch.equal(part[0], whole[row]) for part, whole in zip(alone, batch, strict=True))


def test_a_group_alone_differs_from_its_row_with_optimizer(make_groups, build_quantizer):
    quantizer = build_quantizer(BACKEND, 2)
    assert quantizer.group_local is False
    groups = make_groups("random", 64)
    offset = quantizer.encode(groups)[2]
    alone = torch.cat([quantizer.encode(group[None])[2] for group in groups])
    assert not torch.equal(alone, offset)


@pytest.mark.parametrize("kind", [*VARIED, "constant"])
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.usefixtures("in_half_precision")
def test_half_precision_optimizer_serves_every_group(make_groups, build_quantizer, decode, check_encoded, kind, nbits):
    groups = torch.cat([make_groups(kind, 64), 10 + 1e-4 * make_groups("random", 64)])
    encoded = build_quantizer(BACKEND, nbits).encode(groups)
    check_encoded(groups, nbits, encoded)
    if kind != "constant":
        assert loss(decode(*encoded), groups) <= 1.02 * loss(
            decode(*build_quantizer(BACKEND, nbits, optimize=False).encode(groups)), groups
        )


@pytest.mark.usefixtures("in_half_precision")
def test_vendor_alone_overflows_in_half_precision(make_groups):
    _, values = vendor(make_groups("huge", 64), 4, optimize=True)
    assert not values.isfinite().all()


@pytest.mark.parametrize("optimize", [True, False])
def test_encode_leaves_its_input_alone(make_groups, build_quantizer, check_encoded, optimize):
    quantizer = build_quantizer(BACKEND, 4, optimize=optimize)
    assert isinstance(quantizer, AffineQuantizer)
    groups = make_groups("random", 48, count=12).reshape(2, 6, 48).transpose(0, 1).requires_grad_()
    before = groups.detach().clone()
    encoded = quantizer.encode(groups)
    check_encoded(groups, 4, encoded)
    for part in encoded:
        part.add_(1)
    assert torch.equal(groups, before)
    assert torch.equal(encoded[0] - 1, quantizer.encode(before.contiguous())[0])


@pytest.mark.parametrize("optimize", [True, False])
def test_vendor_is_on_the_call_path(monkeypatch, make_groups, build_quantizer, optimize):
    calls = []
    original = Quantizer.quantize

    def record(tensor, **kwargs):
        calls.append((tensor, kwargs["optimize"]))
        codes, meta = original(tensor, **kwargs)
        return codes.flip(-1), meta

    groups = make_groups("random", 64)
    expected = build_quantizer(BACKEND, 4, optimize=optimize).encode(groups)[0].flip(-1)
    monkeypatch.setattr(Quantizer, "quantize", record)
    codes, _, _ = build_quantizer(BACKEND, 4, optimize=optimize).encode(groups)
    assert [asked for _, asked in calls] == [optimize]
    assert torch.equal(calls[0][0], groups)
    assert torch.equal(codes, expected)


@pytest.mark.costly  # check_light_import of the contract kit sees it too
def test_plugin_does_not_import_the_vendor(modules_after_import):
    modules = modules_after_import("from kvq_backends.hqq import plugin; plugin.kvq_backend().build_options()")
    assert "kvq_backends" in modules
    assert modules.isdisjoint({"optimum", "hqq", "transformers"})


def test_registry_accepts_the_spec():
    backend = get_registry().get_backend("hqq")
    get_registry().check_requirements(backend)
    assert backend == BACKEND
