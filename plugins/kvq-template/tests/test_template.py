"""The tests that a backend should have: the contract, and the bound of its own arithmetic."""

import pytest
import torch
from kvq_template.quantizer import TemplateQuantizer

from kvq.testing import parametrize_contract


@parametrize_contract("template")
def test_contract(contract):
    contract()


@pytest.mark.parametrize("nbits", range(2, 9))
def test_the_error_is_at_most_half_a_step(nbits):
    groups = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale, offset = TemplateQuantizer(nbits).encode(groups)
    error = (codes * scale[:, None] + offset[:, None] - groups).abs()
    step = 2 * groups.abs().amax(-1, keepdim=True) / (2**nbits - 2)
    assert (error <= step / 2 * 1.001).all(), "up to the rounding of float32"
    assert (error > step / 4 * 1.001).any(), "one bit more would be claimed"
