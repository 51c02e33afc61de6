"""What several test files share."""

from __future__ import annotations

import pytest
import torch

from kvq.plugin_api import API_VERSION, BackendOptions, BackendSpec, Capabilities, QuantSpec
from kvq.registry import register_backend

# The models are tiny and the tests run side by side: more threads than one each only get into each other's way.
torch.set_num_threads(1)


class RangeQuantizer:
    """Plain rounding between the least and the greatest element of a group."""

    group_local = True

    def __init__(self, nbits: float) -> None:
        self.max_code = int(2**nbits) - 1

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / self.max_code
        codes = ((groups - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round()
        return codes.clamp(0, self.max_code).to(torch.uint8), scale, low


class RangeOptions(BackendOptions):
    rounds: int = 1
    thresholds: tuple[float, ...] = ()


def build_range_quantizer(spec: QuantSpec, _options: RangeOptions) -> RangeQuantizer:
    return RangeQuantizer(spec.nbits)


@pytest.fixture
def testing_backend() -> BackendSpec:
    """A backend called "testing" in the registry of the process: 1 to 8 and 2.5 bits, both granularities."""
    spec = BackendSpec(
        name="testing",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(1, 2, 2.5, 3, 4, 5, 6, 7, 8)),
        build=build_range_quantizer,
        options=RangeOptions,
    )
    register_backend(spec, replace=True)
    return spec
