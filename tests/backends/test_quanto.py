"""The quanto backend against optimum.quanto's public functions.

Codes are compared with `torch.ops.quanto.quantize_affine` and values with `quantize_weight(...).dequantize()`. Below 8
bits that dequantizer unpacks, which would compile a C++ extension into the installed package; it is handed the unpacked
codes instead, for which it has a branch of its own, and computes as always.
"""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.plugin_api import AffineQuantizer
from kvq.registry import get_registry
from kvq_backends.quanto import plugin

QTYPES = {2: qint2, 4: qint4, 8: qint8}
LENGTHS = (40, 48, 64, 80, 96)
VARIED = ("random", "outlier", "offset", "tiny", "huge")
BACKEND = plugin.kvq_backend()


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Fail wherever quanto would compile one of its extensions."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("quanto tried to compile an extension")

    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", refuse)


def vendor_affine(groups, nbits):
    """Return quanto's codes and dequantized values for groups [N, G], N at least 2."""
    scale, shift = MaxOptimizer()(groups, QTYPES[nbits], axis=0)
    length = groups.shape[-1]
    codes = torch.ops.quanto.quantize_affine(groups, bits=nbits, axis=0, group_size=length, scale=scale, shift=shift)
    weight = quantize_weight(groups, QTYPES[nbits], axis=0, scale=scale, shift=shift, group_size=length)
    weight._data = codes
    return codes, weight.dequantize()


def vendor_symmetric(groups):
    """Return quanto's int8 codes and dequantized values for groups [N, G]; a single group goes per tensor."""
    weight = quantize_weight(groups, qint8, axis=0, scale=AbsmaxOptimizer()(groups, qint8, axis=0))
    return weight._data, weight.dequantize()


def step_of(groups, nbits, *, symmetric):
    """Return the distance of two levels, from fp64."""
    exact = groups.double()
    if symmetric:
        return exact.abs().amax(-1, keepdim=True) / 127
    return (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / (2**nbits - 1)


class OpNames(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("nbits", [2, 4])
def test_affine_equals_vendor(make_groups, build_quantizer, decode, is_close_to_vendor, kind, length, nbits):
    groups = make_groups(kind, length)
    encoded = build_quantizer(BACKEND, nbits).encode(groups)
    codes, values = vendor_affine(groups, nbits)
    assert torch.equal(encoded[0], codes)
    assert is_close_to_vendor(groups, decode(*encoded), values)


@pytest.mark.parametrize("kind", [*VARIED, "constant"])
@pytest.mark.parametrize("length", LENGTHS)
def test_symmetric_equals_vendor(make_groups, build_quantizer, decode, is_close_to_vendor, kind, length):
    groups = make_groups(kind, length)
    groups = groups[groups.abs().amax(-1) > 0]
    encoded = build_quantizer(BACKEND, 8, symmetric_8bit=True).encode(groups)
    codes, values = vendor_symmetric(groups)
    assert torch.equal(encoded[0].int() - 128, codes.int())
    assert is_close_to_vendor(groups, decode(*encoded), values)


def test_affine_8bit_is_the_vendors_operator(make_groups, build_quantizer):
    groups = make_groups("offset", 64)
    codes, scale, offset = build_quantizer(BACKEND, 8, symmetric_8bit=False).encode(groups)
    vendor_scale, shift = MaxOptimizer()(groups, qint8, axis=0)
    expected = torch.ops.quanto.quantize_affine(groups, bits=8, axis=0, group_size=64, scale=vendor_scale, shift=shift)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, vendor_scale[:, 0])
    assert torch.equal(offset, -shift[:, 0])


def test_symmetric_8bit_is_worse_than_4_bits_on_biased_groups(make_groups, build_quantizer, decode):
    # Why the option exists; should a release of quanto change this, its description has to change too.
    groups = make_groups("offset", 64)
    errors = {}
    for name, nbits, symmetric in (("symmetric 8", 8, True), ("affine 8", 8, False), ("affine 4", 4, True)):
        encoded = build_quantizer(BACKEND, nbits, symmetric_8bit=symmetric).encode(groups)
        errors[name] = float((decode(*encoded) - groups).abs().mean())
    assert errors["affine 8"] < 0.1 * errors["affine 4"]
    assert errors["affine 4"] < 0.5 * errors["symmetric 8"]


@pytest.mark.parametrize("kind", [*VARIED, "constant"])
@pytest.mark.parametrize(("nbits", "symmetric"), [(2, True), (4, True), (8, True), (8, False)])
def test_error_is_at_most_half_a_step(
    make_groups, build_quantizer, decode, is_within_half_step, check_encoded, kind, nbits, symmetric
):
    groups = make_groups(kind, 80)
    encoded = build_quantizer(BACKEND, nbits, symmetric_8bit=symmetric).encode(groups)
    step = step_of(groups, nbits, symmetric=symmetric and nbits == 8)
    check_encoded(groups, nbits, encoded)
    assert is_within_half_step(groups, decode(*encoded), step)
    if kind != "constant":
        one_bit_fewer = (encoded[0] & 0xFE, *encoded[1:])
        assert not is_within_half_step(groups, decode(*one_bit_fewer), step)


def test_every_width_round_trips_with_falling_error(make_groups, build_quantizer, decode):
    groups = make_groups("random", 64, count=512)
    errors = []
    for nbits in BACKEND.capabilities.nbits:
        encoded = build_quantizer(BACKEND, nbits).encode(groups)
        assert len(encoded[0].unique()) == 2**nbits
        errors.append(float((decode(*encoded) - groups).abs().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[-2] < 0.1 * errors[0]
    # int8 codes leave out -128, its own mirror image having no place.
    assert len(build_quantizer(BACKEND, 8, symmetric_8bit=True).encode(groups)[0].unique()) == 255


def test_listed_widths_are_the_integer_types_of_the_library():
    from optimum.quanto import qtypes

    integers = {qtype.bits for qtype in qtypes.values() if not qtype.is_floating_point}
    assert set(BACKEND.capabilities.nbits) == integers


@pytest.mark.parametrize("nbits", [1, 3, 7, 1.58])
def test_unlisted_width_is_refused(nbits):
    with pytest.raises(ConfigError, match=r"nbits_k: .* is not supported by backend 'quanto'; choose one of 2, 4, 8$"):
        KVQCacheConfig(backend="quanto", nbits_k=nbits)


@pytest.mark.parametrize("nbits", [2, 4])
def test_constant_groups_have_scale_zero(make_groups, build_quantizer, decode, nbits):
    groups = make_groups("constant", 48)
    codes, scale, offset = build_quantizer(BACKEND, nbits).encode(groups)
    assert not scale.any()
    assert not codes.any()
    assert torch.equal(decode(codes, scale, offset), groups)


def test_zeros_have_scale_zero_at_8_bits(build_quantizer, decode):
    groups = torch.zeros(3, 48)
    codes, scale, offset = build_quantizer(BACKEND, 8).encode(groups)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(decode(codes, scale, offset), groups)


@pytest.mark.parametrize(("nbits", "operator"), [(2, "quantize_affine"), (8, "quantize_symmetric")])
def test_vendor_is_never_asked_to_divide_by_zero(monkeypatch, build_quantizer, nbits, operator):
    # What a nan becomes as an integer is up to the processor.
    scales = []
    original = getattr(torch.ops.quanto, operator)

    def record(base, **kwargs):
        scales.append(kwargs["scale"])
        return original(base, **kwargs)

    monkeypatch.setattr(torch.ops.quanto, operator, record)
    build_quantizer(BACKEND, nbits, symmetric_8bit=True).encode(torch.zeros(3, 48))
    assert len(scales) == 1
    assert (scales[0] > 0).all()


@pytest.mark.parametrize("nbits", [2, 4])
def test_range_past_the_largest_fp32_stays_finite(make_groups, build_quantizer, check_encoded, nbits):
    groups = make_groups("random", 64).clamp(-4, 4) * 8e37
    assert not (groups.amax(-1) - groups.amin(-1)).isfinite().all()
    encoded = build_quantizer(BACKEND, nbits).encode(groups)
    check_encoded(groups, nbits, encoded)
    decoded = encoded[1].double()[:, None] * encoded[0] + encoded[2].double()[:, None]
    assert ((decoded - groups).abs() <= 0.501 * step_of(groups, nbits, symmetric=False)).all()


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_a_group_alone_equals_its_row(make_groups, build_quantizer, nbits):
    quantizer = build_quantizer(BACKEND, nbits)
    assert quantizer.group_local is True
    groups = torch.cat([make_groups(kind, 40, count=4) for kind in (*VARIED, "constant")])
    batch = quantizer.encode(groups)
    for row in range(len(groups)):
        alone = quantizer.encode(groups[row : row + 1])
        assert all(torch.equal(part[0], whole[row]) for part, whole in zip(alone, batch, strict=True))


def test_single_group_equals_vendor_per_tensor(make_groups, build_quantizer, decode, is_close_to_vendor):
    group = make_groups("random", 64, count=1)
    encoded = build_quantizer(BACKEND, 8, symmetric_8bit=True).encode(group)
    codes, values = vendor_symmetric(group)
    assert torch.equal(encoded[0].int() - 128, codes.int())
    assert is_close_to_vendor(group, decode(*encoded), values)


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_encode_leaves_its_input_alone(make_groups, build_quantizer, check_encoded, nbits):
    quantizer = build_quantizer(BACKEND, nbits)
    assert isinstance(quantizer, AffineQuantizer)
    groups = make_groups("random", 48, count=12).reshape(2, 6, 48).transpose(0, 1).requires_grad_()
    before = groups.detach().clone()
    encoded = quantizer.encode(groups)
    check_encoded(groups, nbits, encoded)
    for part in encoded:
        part.add_(1)
    assert torch.equal(groups, before)
    assert torch.equal(encoded[0] - 1, quantizer.encode(before.contiguous())[0])


@pytest.mark.parametrize(
    ("nbits", "operator", "optimizer"),
    [(2, "quanto::quantize_affine", MaxOptimizer), (8, "quanto::quantize_symmetric", AbsmaxOptimizer)],
)
def test_vendor_is_on_the_call_path(monkeypatch, make_groups, build_quantizer, nbits, operator, optimizer):
    calls = []
    original = optimizer.optimize

    def record(self, *args, **kwargs):
        calls.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(optimizer, "optimize", record)
    with OpNames() as recorder:
        build_quantizer(BACKEND, nbits, symmetric_8bit=True).encode(make_groups("random", 48))
    assert recorder.names.count(operator) == 1
    assert calls == [optimizer]


def test_codes_are_the_ones_the_vendor_returns(monkeypatch, make_groups, build_quantizer):
    def quantize_affine(base, **_kwargs):
        return torch.full(base.shape, 3, dtype=torch.uint8)

    monkeypatch.setattr(torch.ops.quanto, "quantize_affine", quantize_affine)
    codes, _, _ = build_quantizer(BACKEND, 4).encode(make_groups("random", 48))
    assert (codes == 3).all()


@pytest.mark.costly  # check_light_import of the contract kit sees it too
def test_plugin_does_not_import_the_vendor(modules_after_import):
    modules = modules_after_import("from kvq_backends.quanto import plugin; plugin.kvq_backend().build_options()")
    assert "kvq_backends" in modules
    assert modules.isdisjoint({"optimum", "hqq", "transformers"})


def test_registry_accepts_the_spec():
    backend = get_registry().get_backend("quanto")
    get_registry().check_requirements(backend)
    assert backend == BACKEND
