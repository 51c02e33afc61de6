import math

import numpy as np
import pytest
import torch

from kvq import KVQ
from kvq.plugin_api.packed_format import LOST_MID, ZERO_SCALE
from kvq.store.byte_metadata import read_bytes, write_bytes


def draw(octaves=6.0, blocks=5, groups=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** (octaves * torch.rand(2, 3, blocks, groups, generator=generator))
    return scale, 3 * torch.randn(2, 3, blocks, groups, generator=generator)


def read(parts):
    return read_bytes(parts["scale"], parts["mid"], parts["units"])


def test_a_scale_is_within_half_a_step_of_a_32nd_octave():
    scale, mid = draw()
    octaves = (read(write_bytes(scale, mid))[0].double() / scale).log2().abs()
    assert octaves.max() < 1.001 / 64
    assert octaves.max() > 0.9 / 64


def test_a_mid_is_within_half_a_127th_of_the_largest():
    scale, mid = draw()
    error = (read(write_bytes(scale, mid))[1].double() - mid).abs() / mid.abs().amax(-1, keepdim=True)
    assert error.max() < 0.5001 / 127
    assert error.max() > 0.45 / 127


def test_what_the_bytes_stand_for():
    """As `PackedFormat` says it, in numpy and by its formulas."""
    scale, mid = draw()
    parts = {name: part.numpy() for name, part in write_bytes(scale, mid).items()}
    found = read_bytes(*(torch.from_numpy(parts[name]) for name in ("scale", "mid", "units")))
    units = parts["units"].astype(np.float64)
    np.testing.assert_allclose(found[0], units[..., :1] * 2.0 ** (-parts["scale"].astype(np.float64) / 32), rtol=1e-6)
    np.testing.assert_allclose(found[1], units[..., 1:] * parts["mid"], rtol=1e-6)
    assert (parts["scale"].dtype, parts["mid"].dtype, parts["units"].dtype) == (np.uint8, np.int8, np.float32)


def test_small_scales_become_the_smallest_or_zero_whichever_is_nearer():
    smallest = 2.0 ** (-254 / 32)
    scale = torch.tensor([1.0, smallest, 0.51 * smallest, 0.49 * smallest, 0.0]).expand(1, 1, 1, 5)
    parts = write_bytes(scale, torch.zeros(1, 1, 1, 5))
    assert parts["scale"].flatten().tolist() == [0, 254, 254, ZERO_SCALE, ZERO_SCALE]
    torch.testing.assert_close(read(parts)[0].flatten(), torch.tensor([1.0, smallest, smallest, 0.0, 0.0]))


@pytest.mark.parametrize("magnitude", [1e-35, 1e38, 0.0])
def test_numbers_at_the_ends_of_fp32(magnitude):
    scale, mid = draw(octaves=0.5)
    scale, mid = scale * magnitude, mid.clamp(-3, 3) * magnitude
    found = read(write_bytes(scale, mid))
    assert all(part.isfinite().all() for part in found)
    for one, other in zip(found, (scale, mid), strict=True):
        assert (one.double() - other).abs().max() <= 0.012 * 3 * magnitude


def test_a_lost_group_loses_itself_alone():
    scale, mid = draw()
    expected = read(write_bytes(scale, mid.index_fill(-1, torch.tensor([7]), 0.0)))[1]
    lost = mid.clone()
    lost[1, 2, 3, 7] = math.nan
    parts = write_bytes(scale, lost)
    assert parts["mid"][1, 2, 3, 7] == LOST_MID
    assert read(parts)[1].isnan().sum() == 1
    others = torch.ones(64, dtype=torch.bool).index_fill(0, torch.tensor([7]), False)
    torch.testing.assert_close(read(parts)[1][1, 2, 3, others], expected[1, 2, 3, others])


def test_each_block_is_rounded_by_itself():
    scale, mid = draw(blocks=7)
    whole = write_bytes(scale, mid)
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        piece = write_bytes(scale[1:, 2:, start:stop].clone(), mid[1:, 2:, start:stop].clone())
        for name, part in piece.items():
            assert torch.equal(part, whole[name][1:, 2:, start:stop]), name


def filled(bits, metadata_dtype, **fields):
    """A cache of 1,024 tokens whose channels have means of their own, and the states."""
    cache = KVQ(backend="native", nbits_k=bits, nbits_v=bits, residual_length=0, sink_length=0,
                metadata_dtype=metadata_dtype, **fields)  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(1, 4, 1024, 64, generator=generator) + torch.randn(1, 4, 1, 64, generator=generator)
    cache.update(states, states, 0)
    return cache, states


def errors(cache, states):
    return [(side.double() - states).square().mean().item() for side in cache.materialize(0)]


@pytest.mark.parametrize("axis", ["per_channel", "per_token"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_cost_next_to_nothing_up_to_four_bits(bits, axis):
    fields = {"axis_key": axis, "axis_value": axis}
    halves, bytes_ = (errors(*filled(bits, dtype, **fields)) for dtype in ("float16", "int8"))
    for half, byte in zip(halves, bytes_, strict=True):
        assert byte < 1.02 * half


def test_they_save_what_they_promise():
    """A group has two numbers of 2 bytes, or of 1 byte and 8 bytes a block for all of its groups."""
    halves, bytes_ = (filled(4, dtype)[0].memory().total_bytes for dtype in ("float16", "int8"))
    blocks, channels = 4 * 1024 // 64, 64
    exponents = blocks
    assert halves - bytes_ == 2 * (blocks * channels * 2 + exponents - 8 * blocks)


@pytest.mark.parametrize("bits", [5, 8])
def test_wider_codes_keep_the_default(bits):
    one, other = (filled(bits, dtype)[0] for dtype in (None, "int8"))
    assert one.memory().total_bytes == other.memory().total_bytes
    for side, same in zip(one.materialize(0), other.materialize(0), strict=True):
        assert torch.equal(side, same)


def test_it_is_read_from_a_file_and_written(tmp_path):
    cache, _ = filled(3, "int8")
    assert cache.config.to_dict()["metadata_dtype"] == "int8"
    cache.save(tmp_path / "cache.kvq")
    loaded = KVQ.load(tmp_path / "cache.kvq")
    for one, other in zip(cache.materialize(0), loaded.materialize(0), strict=True):
        assert torch.equal(one, other)
    assert loaded.memory().total_bytes == cache.memory().total_bytes
