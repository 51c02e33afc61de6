import pytest
import torch

from kvq.plugin_api.packing import join_planes, pack, plane_widths, split_planes, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [-1, -2])
def test_every_width_survives_and_takes_exactly_its_bits(bits, dim):
    codes = torch.randint(0, 2**bits, (3, 32, 48), dtype=torch.uint8)
    planes = split_planes(codes, bits)
    packed = {width: pack(plane, width, dim) for width, plane in planes.items()}
    assert sum(part.numel() for part in packed.values()) * 8 == codes.numel() * bits
    assert sum(plane_widths(bits)) == bits
    back = join_planes({width: unpack(part, width, dim) for width, part in packed.items()})
    assert torch.equal(back, codes)


def test_layout_is_split_half_along_tokens():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack(codes, 4, -1)
    assert [(byte & 15, byte >> 4) for byte in packed.tolist()] == [(i, i + 8) for i in range(8)]
    quarters = pack(torch.tensor([3, 0, 1, 2, 2, 1, 0, 3], dtype=torch.uint8), 2, -1)
    assert quarters.tolist() == [3 | 1 << 2 | 2 << 4 | 0 << 6, 0 | 2 << 2 | 1 << 4 | 3 << 6]


def test_planes_hold_the_low_bits_first():
    assert {
        width: plane.item() for width, plane in split_planes(torch.tensor(0b1_01_1010, dtype=torch.uint8), 7).items()
    } == {
        4: 0b1010,
        2: 0b01,
        1: 1,
    }
