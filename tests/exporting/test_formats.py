"""Formats of other engines against their own quantizers, or against every number that the format has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvq.exporting.float_formats import Float4, Float8, Float8PerToken
from kvq.exporting.ggml_formats import GgmlFormat
from kvq.exporting.integer_formats import Int4PerToken, Int8BetweenExtremes, Int8PerTensor, Int8PerToken, MlxAffine
from kvq.exporting.state_format import Rotated, StateFormat

GGML = [
    GgmlFormat("q8_0", 8, has_minimum=False),
    GgmlFormat("q5_1", 5, has_minimum=True),
    GgmlFormat("q5_0", 5, has_minimum=False),
    GgmlFormat("q4_1", 4, has_minimum=True),
    GgmlFormat("q4_0", 4, has_minimum=False),
]
MLX_GROUP = (np.sin(np.arange(32) * 1.7) * np.linspace(0.1, 3, 32) + 0.25).astype(np.float16)
MLX_READ = {
    2: "0 0 0 0 0 1.3594 0 0 1.3594 0 -1.3594 0 1.3594 0 -1.3594 1.3594 1.3594 -1.3594 -1.3594 1.3594 1.3594 -1.3594 0 "
    "2.7188 0 -1.3594 1.3594 2.7188 -1.3594 -1.3594 2.7188 2.7188",
    4: "0.3398 0.3398 0.3398 0 0.3398 0.6797 -0.3398 -0.3398 1.0195 0.6797 -0.6797 0 1.3594 0 -1.0195 0.6797 1.6992 "
    "-0.6797 -1.0195 1.6992 1.3594 -1.6992 -0.3398 2.3789 0.3398 -2.0391 0.6797 2.7188 -1.0195 -2.0391 2.0391 2.0391",
}
"""What `mx.dequantize(*mx.quantize(...))` of MLX 0.32 gives for `MLX_GROUP`, by bits."""


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 24, 64, generator=generator) * torch.logspace(-3, 1, 64) + 0.1


@pytest.mark.parametrize("one", GGML, ids=lambda one: one.name)
def test_ggml_formats_are_those_of_the_package_gguf_to_the_bit(one, states):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[one.name.upper()]
    packed = gguf.quants.quantize(states.numpy(), kind)
    assert torch.equal(one.rounded(states), torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    assert one.bits(64) == 8 * packed.nbytes / states.numel()
    assert (one.fits(96), one.fits(80)) == (True, False)


def test_a_block_of_zeros_stays_zero():
    zeros = torch.zeros(1, 1, 2, 64)
    for one in (
        *GGML,
        Float4("x", "mx"),
        Float4("x", "nv"),
        MlxAffine("x", 4, 64),
        Int8PerToken("x"),
        Int4PerToken("x"),
    ):
        assert torch.equal(one.rounded(zeros), zeros), one


def _every_float8(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> torch.Tensor:
    """Return the finite numbers of a format of 8 bits, from its definition."""
    numbers = {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            lead, power = (1, exponent) if exponent else (0, 1)
            number = (lead + mantissa / 2**mantissa_bits) * 2.0 ** (power - bias)
            numbers |= {number, -number} if number <= largest else set()
    return torch.tensor(sorted(numbers))


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [(torch.float8_e4m3fn, _every_float8(4, 3, 7, 448.0)), (torch.float8_e5m2, _every_float8(5, 2, 15, 57344.0))],
)
def test_float8_is_the_nearest_number_and_saturates(dtype, numbers, states):
    read = Float8("x", dtype).rounded(states)
    least = (states[..., None] - numbers).abs().amin(-1)
    torch.testing.assert_close((read - states).abs(), least, rtol=0, atol=1e-7)
    assert Float8("x", dtype).rounded(torch.tensor([1e9, -1e9])).tolist() == [numbers.max(), numbers.min()]


def test_a_scale_for_each_token_and_head_reaches_its_largest_element(states):
    for one, steps in ((Float8PerToken("x"), 28), (Int8PerToken("x"), 2 * 127)):
        read, largest = one.rounded(states), states.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(read.abs().amax(-1, keepdim=True), largest)
        assert ((read - states).abs() <= largest / steps * 1.0001).all()
        assert one.bits(64) == 8.5


def test_integers_between_extremes_err_by_half_a_step(states):
    width = states.amax(-1, keepdim=True) - states.amin(-1, keepdim=True)
    eight = Int8BetweenExtremes("x").rounded(states)
    assert ((eight - states).abs() <= width / 255 * 0.5 + width * 2**-10).all()
    four = Int4PerToken("x").rounded(states)
    assert ((four - states).abs() <= width / 15 * 1.0001).all()  # half a step, and half of one of the zero point
    assert ((four - states).abs() > width / 15 * 0.4).any()


def test_one_scale_for_a_tensor_comes_from_the_calibration(states):
    one = Int8PerTensor("x").calibrated(states)
    assert isinstance(one, Int8PerTensor)
    assert one.scale == pytest.approx(states.abs().max().item() / 127)
    expected = (states.double() / one.scale).round().clamp(-128, 127) * one.scale
    torch.testing.assert_close(one.rounded(states), expected.float())
    assert one.rounded(states * 3).abs().max() == pytest.approx(128 * one.scale)


@pytest.mark.parametrize("bits", [2, 4])
def test_mlx_groups_read_as_mlx_reads_them(bits):
    expected = torch.tensor([float(text) for text in MLX_READ[bits].split()])
    read = MlxAffine("x", bits, 32).rounded(torch.from_numpy(MLX_GROUP).float()[None, None, None])
    torch.testing.assert_close(read[0, 0, 0], expected, rtol=0, atol=2e-3)


def test_mlx_itself_agrees_where_it_is_installed(states):
    mx = pytest.importorskip("mlx.core")
    for bits, size in ((2, 32), (4, 64), (8, 64)):
        parts = mx.quantize(mx.array(states.half().numpy()), group_size=size, bits=bits)
        expected = np.array(mx.dequantize(*parts, group_size=size, bits=bits)).astype(np.float32)
        read = MlxAffine("x", bits, size).rounded(states.half().float())
        torch.testing.assert_close(read, torch.from_numpy(expected), rtol=1e-3, atol=8e-3)  # it computes in float16


def test_microscaled_float4_is_the_nearest_level_under_a_power_of_two(states):
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels.flip(0), levels])
    blocks = states.unflatten(-1, (-1, 16))
    step = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 6))
    least = (blocks[..., None] - levels * step[..., None]).abs().amin(-1)
    read = Float4("x", "mx").rounded(states).unflatten(-1, (-1, 16))
    torch.testing.assert_close((read - blocks).abs(), least, rtol=1e-5, atol=1e-6)
    assert Float4("x", "mx").bits(64) == 4.5


def test_nvfp4_has_a_finer_scale_than_powers_of_two(states):
    one = Float4("x", "nv").calibrated(states)
    assert isinstance(one, Float4)
    assert one.scale == pytest.approx(states.abs().max().item() / (6 * 448))
    assert _error(one, states) < 0.9 * _error(Float4("x", "mx"), states)
    blocks = states.unflatten(-1, (-1, 16))
    read = one.rounded(states).unflatten(-1, (-1, 16))
    step = (blocks.abs().amax(-1, keepdim=True) / 6 / one.scale).to(torch.float8_e4m3fn).float() * one.scale
    assert set((read / step).abs().round(decimals=3).unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


def test_rotation_spreads_an_outlier_and_is_undone():
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, 2, 50, 128, generator=generator)
    states[..., 7] *= 40
    plain = GGML[-1]
    for one in (Rotated(plain), Rotated(plain, block=64), Rotated(plain, seed=3)):
        assert _error(one, states) < 0.6 * _error(plain, states)
        assert (one.name, one.bits(128), one.fits(80)) == ("q4_0", 4.5, False)
    odd = torch.randn(1, 2, 5, 96, generator=generator)
    assert torch.equal(Rotated(plain).rounded(odd), plain.rounded(odd))  # 96 is no multiple of 64


def _error(one: StateFormat, states: torch.Tensor) -> float:
    return ((one.rounded(states) - states).norm() / states.norm()).item()
