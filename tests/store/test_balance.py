import math

import numpy as np
import pytest
import torch

from kvq.store.balance import FACTORS, _sum_squares, even_out, read_factors

STEP = 2 ** (1 / 32)


def lengths(blocks):
    return blocks.double().square().mean(-1).sqrt()


def uneven_blocks(dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** (torch.rand(2, 3, 4, 64, 1, generator=generator) * 6)
    return torch.randn(2, 3, 4, 64, dim, generator=generator) * sizes


@pytest.mark.parametrize("dim", [8, 64, 67, 80, 128])
def test_all_tokens_of_a_block_get_the_length_of_its_longest(dim):
    blocks = uneven_blocks(dim)
    even, codes = even_out(blocks)
    longest = lengths(blocks).amax(-1, keepdim=True)
    ratio = lengths(even) / longest
    assert ratio.min() > STEP**-0.5001
    assert ratio.max() < STEP**0.5001
    assert codes.dtype == torch.uint8
    assert codes.amax() > 100, "the tokens differ by up to 6 powers of two"
    assert (codes.amin(-1) == 0).all(), "the longest of each block stays as it is"


def test_factors_lead_back():
    blocks = uneven_blocks()
    even, codes = even_out(blocks)
    torch.testing.assert_close(even * read_factors(codes)[..., None], blocks, rtol=3e-7, atol=0)
    expected = torch.tensor([2.0 ** (-code / 32) for code in range(256)], dtype=torch.float64)
    torch.testing.assert_close(FACTORS.numbers.double(), expected, rtol=1e-7, atol=0)
    assert torch.equal(read_factors(torch.arange(256, dtype=torch.uint8)), FACTORS.numbers)


def test_a_block_alone_or_in_another_layout_has_the_same_codes():
    """Else what is stored would depend on how states are split into updates."""
    blocks = uneven_blocks(dim=80)
    _, codes = even_out(blocks)
    for batch, head, block in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        alone = blocks[batch : batch + 1, head : head + 1, block : block + 1]
        assert torch.equal(even_out(alone)[1][0, 0, 0], codes[batch, head, block])
    strided = blocks.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(even_out(strided)[1], codes)


@pytest.mark.parametrize("dim", [64, 80])
def test_sums_have_an_order_of_their_own(dim):
    """That of torch depends on processor and shape, and a token at the edge of two codes would follow it."""
    states = torch.randn(2000, dim, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((2000, 1 << (dim - 1).bit_length()), dtype=np.float32)
    expected[:, :dim] = states.numpy() ** 2
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = expected[:, :half] + expected[:, half:]
    assert _sum_squares(states).numpy().tobytes() == expected.tobytes()


def test_a_token_much_shorter_than_the_longest_has_the_least_factor():
    blocks = torch.ones(1, 1, 1, 8, 16)
    blocks[..., 3, :] = 1e-6
    blocks[..., 5, :] = 0
    codes = even_out(blocks)[1].flatten().tolist()
    assert codes == [0, 0, 0, 255, 0, 255, 0, 0]


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-30, 1e25, 3e29, 1e31, 3e38], ids=str)
def test_any_magnitude_stays_finite(magnitude):
    blocks = uneven_blocks().sign() * torch.linspace(0.001, 1, 64)[:, None] * magnitude
    even, codes = even_out(blocks)
    assert even.isfinite().all()
    torch.testing.assert_close(even * read_factors(codes)[..., None], blocks, rtol=3e-7, atol=1e-44)


def test_a_short_token_with_one_large_element_does_not_overflow():
    blocks = torch.zeros(1, 1, 1, 8, 64)
    blocks[..., 0, :] = 3e38
    blocks[..., 1, 5] = 3e38
    assert even_out(blocks)[0].isfinite().all()


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_lost_element_counts_as_zero(lost):
    blocks = uneven_blocks()
    blocks[0, 0, 0, 7, 5] = 0
    expected = even_out(blocks)[1]
    blocks[0, 0, 0, 7, 5] = lost
    even, codes = even_out(blocks)
    assert torch.equal(codes, expected)
    assert not even[0, 0, 0, 7, 5].isfinite()
    assert even.isfinite().sum() == even.numel() - 1
