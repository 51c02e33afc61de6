"""The public helpers of kvq.plugin_api, against arithmetic of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvq.plugin_api import clamp_to_dtype, hadamard_transform, pack_codes, packed_length, unpack_codes


def read_bits(packed: list[int], bits: int, count: int) -> list[int]:
    """Read codes as the documentation of `PackedFormat` says, byte by byte."""
    filled, codes, first, shift = math.ceil(count / 8) * 8, [0] * (math.ceil(count / 8) * 8), 0, 0
    for width in (4, 2, 1) if bits < 8 else (8,):
        if not bits & width:
            continue
        stride = filled * width // 8
        for place in range(filled):
            byte, field = place % stride, place // stride
            codes[place] |= ((packed[first + byte] >> (field * width)) & (2**width - 1)) << shift
        first, shift = first + stride, shift + width
    return codes[:count]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 61, 128])
def test_codes_lie_as_it_is_written(bits, count):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack_codes(codes, bits)
    assert packed.shape[-1] == packed_length(count, bits) == math.ceil(count / 8) * bits
    assert read_bits(packed.tolist(), bits, count) == codes.tolist()
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension_can_be_packed(bits, dim):
    codes = torch.randint(2**bits, (24, 9, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits, dim)
    assert torch.equal(packed, pack_codes(codes.movedim(dim, -1).contiguous(), bits).movedim(-1, dim))
    assert torch.equal(unpack_codes(packed, bits, codes.shape[dim], dim), codes)
    packed.fill_(255)
    assert int(codes.max()) < 2**bits
    assert (codes != 255).any(), "never an alias"


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_other_widths_are_refused(bits):
    for call in (
        lambda: pack_codes(torch.zeros(8, dtype=torch.uint8), bits),
        lambda: unpack_codes(torch.zeros(8, dtype=torch.uint8), bits, 8),
        lambda: packed_length(8, bits),
    ):
        with pytest.raises(ValueError, match="choose 1 to 8"):
            call()


def test_what_is_no_code_is_refused():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        pack_codes(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="16 codes of 4 bits take 8 bytes, not 7"):
        unpack_codes(torch.zeros(7, dtype=torch.uint8), 4, 16)


def sylvester(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.mark.parametrize(("length", "block"), [(128, 128), (80, 16), (67, 1), (1, 1)])
def test_the_transform_is_sylvesters_matrix_in_blocks(length, block):
    states = torch.randn(3, 5, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = states.numpy() @ np.kron(np.eye(length // block), sylvester(block))
    torch.testing.assert_close(hadamard_transform(states), torch.from_numpy(expected))
    torch.testing.assert_close(hadamard_transform(states.mT, -2).mT, torch.from_numpy(expected))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(states)), states)
    hadamard_transform(states).zero_()
    assert states.any(), "never an alias"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_on_the_way_may_be_past_the_end_of_float16(dtype):
    states = torch.full((128,), 3000.0, dtype=dtype)
    expected = torch.zeros(128, dtype=torch.float64)
    expected[0] = states[0].double() * math.sqrt(128)
    found = hadamard_transform(states)
    assert torch.equal(found, expected.to(dtype)), "33941 in float16, by way of 384000"
    assert found.dtype == dtype


def test_narrow_dtypes_are_rounded_once():
    states = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = torch.from_numpy(states.double().numpy() @ sylvester(128))
    found = hadamard_transform(states).double()
    assert ((found - expected).abs() <= expected.abs() * 2.0**-8 + 1e-5).all()


def test_what_has_no_transform_is_refused():
    with pytest.raises(ValueError, match="dim=0"):
        hadamard_transform(torch.zeros(8), 0)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        hadamard_transform(torch.zeros(8, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_past_the_end_become_the_end(dtype):
    states = torch.tensor([1.5, -torch.inf, 3.4e38, -3.4e38, torch.nan, 0.0])
    kept = states.clone()
    found = clamp_to_dtype(states, dtype).to(dtype).float().tolist()
    largest = torch.finfo(dtype).max
    assert found[:4] == [1.5, -largest, largest, -largest]
    assert math.isnan(found[4])
    assert torch.equal(states.nan_to_num(), kept.nan_to_num()), "not written to"


LARGEST = {torch.float32: (2 - 2**-23) * 2.0**127, torch.bfloat16: (2 - 2**-7) * 2.0**127, torch.float16: 65504.0}
"""By the formats themselves: all bits of the significand set, and the largest exponent."""
LARGEST_OF_BOTH = {
    **{(own, other): min(LARGEST[own], LARGEST[other]) for own in LARGEST for other in LARGEST},
    (torch.bfloat16, torch.float16): 65280.0,  # eight bits set: the next one up is 65536
    **{(own, torch.float8_e4m3fn): 448.0 for own in LARGEST},
    **{(own, torch.float8_e5m2): 57344.0 for own in LARGEST},
}


@pytest.mark.parametrize(("own", "other"), LARGEST_OF_BOTH, ids=str)
def test_the_end_is_a_number_of_both_dtypes(own, other):
    states = torch.tensor([torch.inf, -torch.inf, LARGEST[own], torch.nan, 1.5], dtype=own)
    found = clamp_to_dtype(states, other)
    largest = LARGEST_OF_BOTH[own, other]
    assert found.dtype == own
    assert found[[0, 1, 2, 4]].tolist() == [largest, -largest, largest, 1.5]
    assert found.to(other).float()[[0, 1, 2, 4]].isfinite().all()
    assert math.isnan(found[3])


def test_a_dtype_without_such_numbers_is_refused():
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        clamp_to_dtype(torch.zeros(3), torch.uint8)
