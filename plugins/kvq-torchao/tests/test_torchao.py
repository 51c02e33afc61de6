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
