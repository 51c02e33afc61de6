"""The contract of the MX formats, and numbers of the specification."""

import pytest
import torch
from kvq_torchao.mx_quantizer import MXQuantizer

from kvq.testing import parametrize_contract

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""The magnitudes of FP4, table 5 of the OCP Microscaling Formats specification 1.0."""
E2M3 = (*(k / 8 for k in range(8)), *((1 + k / 8) * 2**e for e in range(3) for k in range(8)))
"""The magnitudes of FP6 E2M3: one bit of exponent below 1, three bits of mantissa."""


@parametrize_contract("torchao-mx")
def test_contract(contract):
    contract()


def restore(states, nbits, scaling="even"):
    quantizer = MXQuantizer(states.shape[-1], nbits, scaling)
    out = torch.full_like(states, torch.nan)
    quantizer.decode_into(quantizer.encode(states), out)
    return out


@pytest.mark.parametrize(("nbits", "magnitudes"), [(4, E2M1), (6, E2M3)])
def test_the_numbers_of_the_format_come_back_as_they_are(nbits, magnitudes):
    numbers = torch.tensor([*magnitudes, *(-one for one in magnitudes)])
    states = torch.zeros(1, 1, 32, 32 * 4)
    states[..., : len(numbers)] = numbers
    states[..., 31::32] = max(magnitudes)  # every run has the largest number, so its power of two is 1
    states = states * torch.logspace(-20, 20, 32, base=2.0)[:, None].log2().round().exp2()
    assert torch.equal(restore(states, nbits), states)


@pytest.mark.parametrize(("nbits", "floor", "rceil"), [(4, 6.0, 8.0), (6, 7.5, 8.0)])
def test_floor_cuts_off_what_rceil_makes_room_for(nbits, floor, rceil):
    states = torch.zeros(1, 1, 32, 32)
    states[..., 3] = 7.9
    found = {mode: restore(states, nbits, mode)[0, 0, 0, 3].item() for mode in ("floor", "rceil")}
    assert found == {"floor": floor, "rceil": rceil}


def test_what_a_head_of_80_elements_takes():
    layout = MXQuantizer(80, 4, "even").layout()
    assert sum(part.block_bytes for part in layout.values()) == 32 * (96 // 2 + 96 // 32)
