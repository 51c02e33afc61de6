"""A tiny model, texts for it, and a backend that shows which statistics it is given."""

import pytest
import torch
from small_llama import build_model

from kvq import calibrate, register_backend
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities


class AbsMaxQuantizer:
    """Spreads codes between the extremes of a channel that the statistics have; without any, of a group."""

    group_local = True

    def __init__(self, nbits):
        self.steps = 2**nbits - 1

    def encode(self, groups):
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / self.steps
        codes = ((groups - low[..., None]) / scale.masked_fill(scale == 0, 1)[..., None]).round()
        return codes.to(torch.uint8), scale, low


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def sequences():
    return torch.randint(0, 97, (3, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def calibration(model, sequences):
    return calibrate(model, sequences, text="drawn")


@pytest.fixture
def asking():
    """Register a backend that asks for statistics; return the specs that it was built from."""
    seen = []

    def build(spec, options):
        seen.append(spec)
        return AbsMaxQuantizer(int(spec.nbits))

    def register(word, name="asking"):
        register_backend(
            BackendSpec(
                name=name,
                api_version=API_VERSION,
                capabilities=Capabilities(nbits=(2, 4, 8)),
                build=build,
                summary="asks for statistics",
                calibration=word,
            ),
            replace=True,
        )
        return seen

    return register
