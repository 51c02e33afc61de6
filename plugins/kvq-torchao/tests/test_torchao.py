"""The contract, and that codes and numbers are those of torchao's public functions."""

import pytest
import torch
from kvq_torchao.quantizer import TorchAOQuantizer
from torchao.quantization import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

from kvq.testing import parametrize_contract


@parametrize_contract("torchao")
def test_contract(contract):
    contract()


@parametrize_contract("torchao", options={"preserve_zero": True}, fast=True)
def test_contract_with_its_own_range(contract):
    contract()


@pytest.mark.parametrize("nbits", range(1, 9))
def test_the_vendor_decides_codes_and_numbers(nbits):
    groups = torch.randn(40, 64, generator=torch.Generator().manual_seed(nbits)) * 3 - 1
    limits = {"quant_min": 0, "quant_max": 2**nbits - 1}
    scale, zero = choose_qparams_affine(groups, MappingType.ASYMMETRIC, (1, 64), torch.uint8, **limits)
    theirs = quantize_affine(groups, (1, 64), scale, zero, torch.uint8, **limits)
    expected = dequantize_affine(theirs, (1, 64), scale, zero, torch.uint8, **limits)
    codes, own_scale, offset = TorchAOQuantizer(nbits, preserve_zero=True).encode(groups)
    assert torch.equal(codes, theirs)
    found = codes * own_scale[:, None] + offset[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_vendor_is_called(monkeypatch):
    called = []

    def record(*args, **fields):
        called.append(args[0].shape)
        return quantize_affine(*args, **fields)

    monkeypatch.setattr("kvq_torchao.quantizer.quantize_affine", record)
    TorchAOQuantizer(4).encode(torch.randn(2, 3, 64))
    assert called == [(6, 64)]


@pytest.mark.parametrize("nbits", range(4, 9))
def test_a_group_far_from_zero_has_the_steps_of_its_own_range(nbits):
    groups = torch.randn(40, 64, generator=torch.Generator().manual_seed(nbits)) + 100
    errors = {}
    for preserve_zero in (False, True):
        codes, scale, offset = TorchAOQuantizer(nbits, preserve_zero=preserve_zero).encode(groups)
        errors[preserve_zero] = (codes * scale[:, None] + offset[:, None] - groups).abs()
    step = (groups.amax(-1) - groups.amin(-1))[:, None] / (2**nbits - 1)
    assert (errors[False] <= step / 2 + 1e-4).all()
    assert errors[True].square().mean() > 50 * errors[False].square().mean()


@pytest.mark.parametrize("preserve_zero", [False, True])
@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-41, 1e-36, 8e37])
def test_groups_of_any_size_have_steps_of_their_range(size, nbits, preserve_zero):
    """In float64 on what is returned: at 8e37 ranges pass the largest fp32, at 1e-41 all numbers are denormal."""
    groups = torch.randn(40, 64, generator=torch.Generator().manual_seed(nbits)) * size
    codes, scale, offset = TorchAOQuantizer(nbits, preserve_zero=preserve_zero).encode(groups)
    found = codes * scale.double()[:, None] + offset.double()[:, None]
    step = (groups.double().amax(-1) - groups.double().amin(-1))[:, None] / (2**nbits - 1)
    # The zero point of torchao's own range is rounded, which moves the ends by half a step.
    steps = 1.01 if preserve_zero else 0.51
    # Scales of denormal numbers are rounded to 2 ** -149, in each of the codes.
    assert ((found - groups.double()).abs() <= steps * step + 2.0**-150 * 2**nbits).all()


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_a_power_of_two_changes_no_code(nbits):
    groups = torch.randn(40, 64, generator=torch.Generator().manual_seed(nbits)) + 1
    codes, scale, offset = TorchAOQuantizer(nbits).encode(groups)
    for factor in (2.0**-60, 2.0**100):
        found = TorchAOQuantizer(nbits).encode(groups * factor)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scale * factor)
        assert torch.equal(found[2], offset * factor)


@pytest.mark.parametrize("nbits", [1, 4])
def test_the_largest_numbers_get_finite_scales(nbits):
    groups = torch.tensor([[-1.0, 1.0] * 32]) * torch.finfo(torch.float32).max
    for preserve_zero in (False, True):
        codes, scale, offset = TorchAOQuantizer(nbits, preserve_zero=preserve_zero).encode(groups)
        assert scale.isfinite().all()
        assert offset.isfinite().all()
        assert preserve_zero or codes[0, :2].tolist() == [0, 2**nbits - 1]
