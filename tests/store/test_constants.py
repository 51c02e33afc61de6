"""A quantizer that is built anew gets the constants of the one before it, bit for bit, or is refused."""

import pytest
import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api import Part
from kvq.store.constants import restore_constants

LIKE = torch.zeros(1, 2, 0, 4)


class Calibrated:
    """Learns a scale from the first block that it encodes, unless it was given one."""

    group_local = False
    block_length = 2

    def __init__(self):
        self.scale = torch.full((3,), torch.nan)
        self.encoded = 0

    def layout(self):
        return {"codes": Part((2, 4), torch.int8)}

    def constants(self):
        return {"scale": self.scale}

    def encode(self, states):
        self.encoded += 1
        assert states.shape == (1, 2, 2, 4)
        if self.scale.isnan().any():
            self.scale.fill_(float(states.abs().max()))
        return {"codes": torch.zeros(1, 2, 1, 2, 4, dtype=torch.int8)}

    def decode_into(self, parts, out):
        out.zero_()


class Forgetful(Calibrated):
    """Hands out copies, so that what is written to them is lost."""

    def constants(self):
        return {"scale": self.scale.clone()}


class Relearning(Calibrated):
    """Learns from any block."""

    def encode(self, states):
        self.scale.fill_(float(states.abs().max()))
        return super().encode(states)


GIVEN = {"scale": torch.tensor([1.5, -0.0, 2.5])}


@pytest.mark.parametrize("settled", [True, False])
def test_constants_come_back_bit_for_bit(settled):
    quantizer = Calibrated()
    restore_constants(quantizer, GIVEN, LIKE, settled=settled)
    assert torch.equal(quantizer.scale.view(torch.int32), GIVEN["scale"].view(torch.int32))
    assert quantizer.encoded == settled


def test_what_was_not_learned_yet_stays_unknown():
    quantizer = Calibrated()
    restore_constants(quantizer, {"scale": torch.full((3,), torch.nan)}, LIKE, settled=False)
    assert quantizer.scale.isnan().all()


@pytest.mark.parametrize("settled", [True, False])
def test_a_quantizer_that_loses_them_is_refused(settled):
    with pytest.raises(QuantizerContractError, match="Forgetful does not keep its constant 'scale'"):
        restore_constants(Forgetful(), GIVEN, LIKE, settled=settled)


def test_one_that_learns_anew_is_refused_where_a_block_is_stored():
    with pytest.raises(QuantizerContractError, match="Relearning does not keep"):
        restore_constants(Relearning(), GIVEN, LIKE, settled=True)
    restore_constants(Relearning(), GIVEN, LIKE, settled=False)
