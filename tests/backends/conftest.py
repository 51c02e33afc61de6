"""Groups and quantizers that the tests of every shipped backend share."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvq.plugin_api import AffineQuantizer, BackendSpec, Granularity, QuantSpec


def _random(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, length, generator=generator)


def _with_outlier(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    groups = _random(count, length, generator)
    groups[torch.arange(count), torch.randint(length, (count,), generator=generator)] *= 30
    return groups


def _offset(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    signs = torch.tensor([1.0, -1.0]).repeat(count)[:count, None]
    return _random(count, length, generator) + 100 * signs


def _constant(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(count, 1, generator=generator)
    values[:3] = torch.tensor([[0.0], [-7.0], [3e4]])
    return values.repeat(1, length)


def _tiny(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return 1e-5 * _random(count, length, generator)


def _huge(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return 1e6 * _random(count, length, generator)


KINDS = {
    "random": _random,
    "outlier": _with_outlier,
    "offset": _offset,
    "constant": _constant,
    "tiny": _tiny,
    "huge": _huge,
}


@pytest.fixture
def make_groups() -> Callable[..., torch.Tensor]:
    """Return a factory of fp32 groups [count, length]; equal arguments give equal groups."""

    def make(kind: str, length: int, count: int = 64) -> torch.Tensor:
        return KINDS[kind](count, length, torch.Generator().manual_seed(length))

    return make


@pytest.fixture
def make_spec() -> Callable[[float], QuantSpec]:
    """Return a factory of the facts that a quantizer is built from."""

    def make(nbits: float) -> QuantSpec:
        return QuantSpec(
            side="key",
            layer_idx=3,
            nbits=nbits,
            granularity=Granularity.PER_CHANNEL,
            group_length=64,
            num_heads=2,
            head_dim=64,
            states_dtype=torch.bfloat16,
            metadata_dtype=torch.float16,
            device=torch.device("cpu"),
            seed=0,
        )

    return make


@pytest.fixture
def build_quantizer(make_spec) -> Callable[..., AffineQuantizer]:
    """Return a function that builds a quantizer as the core does."""

    def build(backend: BackendSpec, nbits: float, **options: Any) -> AffineQuantizer:
        return backend.build(make_spec(nbits), backend.build_options(options))

    return build


@pytest.fixture
def decode() -> Callable[..., torch.Tensor]:
    """Return `scale * code + offset` in fp32, the arithmetic that the core promises."""

    def run(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return scale[..., None] * codes + offset[..., None]

    return run


@pytest.fixture
def is_close_to_vendor() -> Callable[..., bool]:
    """Tell whether two decoded batches agree to 1e-6 of the largest magnitude in each group."""

    def check(groups: torch.Tensor, ours: torch.Tensor, vendors: torch.Tensor) -> bool:
        largest = groups.double().abs().amax(-1, keepdim=True)
        return bool(((ours.double() - vendors.double()).abs() <= 1e-6 * largest).all())

    return check


@pytest.fixture
def is_within_half_step() -> Callable[..., bool]:
    """Tell in fp64 whether every error is at most half a step, and the rounding of fp32."""

    def check(groups: torch.Tensor, decoded: torch.Tensor, step: torch.Tensor) -> bool:
        exact = groups.double()
        rounding = 2.0**-21 * exact.abs().amax(-1, keepdim=True)
        return bool(((decoded.double() - exact).abs() <= 0.5 * step + rounding).all())

    return check


@pytest.fixture
def check_encoded() -> Callable[..., None]:
    """Assert the contract of `AffineQuantizer.encode` for one result."""

    def check(groups: torch.Tensor, nbits: float, encoded: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        codes, scale, offset = encoded
        assert codes.dtype == torch.uint8
        assert codes.shape == groups.shape
        assert int(codes.max()) < 2 ** math.ceil(nbits)
        for part in (scale, offset):
            assert part.dtype == torch.float32
            assert part.shape == groups.shape[:-1]
            assert part.isfinite().all()
        assert not any(part.requires_grad or part.is_inference() for part in encoded)
        assert (codes[scale == 0] == 0).all()

    return check


@pytest.fixture
def modules_after_import() -> Callable[[str], set[str]]:
    """Return the top-level names in `sys.modules` of a fresh interpreter that has run some code."""

    def run(code: str) -> set[str]:
        program = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return set(result.stdout.split())

    return run
