"""The affine codec against fp64 arithmetic on what the backend decided."""

from dataclasses import replace

import pytest
import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Quantizer, QuantSpec
from kvq.store.affine import AffineCodec, balanced_group_length


class RoundToNearest:
    """The smallest affine quantizer, which remembers what it said."""

    group_local = True

    def __init__(self, bits):
        self.bits = bits
        self.said = []

    def encode(self, groups):
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / (2**self.bits - 1)
        codes = ((groups - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round().clamp(0, 2**self.bits - 1)
        self.said.append((groups.clone(), codes, scale, low))
        return codes.to(torch.uint8), scale, low


def make_codec(
    bits=4, side="key", granularity="per_channel", head_dim=64, group_size=64, metadata=torch.float16, **more
):
    granularity = Granularity(granularity)
    group_length = group_size
    if granularity is Granularity.PER_TOKEN:
        group_length = balanced_group_length(head_dim, group_size)
    spec = QuantSpec(
        side, 0, bits, granularity, group_length, 2, head_dim, torch.float32, metadata, torch.device("cpu"), seed=0
    )
    return AffineCodec(RoundToNearest(bits), replace(spec, **more))


def decode(codec, parts, tokens):
    out = torch.full((2, 2, tokens, codec.spec.head_dim), float("nan"))
    codec.decode_into(parts, out)
    return out


SIDES = [("key", "per_channel"), ("value", "per_token"), ("key", "per_token"), ("value", "per_channel")]


@pytest.mark.parametrize(("side", "granularity"), SIDES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [48, 67, 80, 96])
def test_decoding_gives_what_the_quantizer_decided(side, granularity, bits, head_dim):
    codec = make_codec(bits, side, granularity, head_dim, group_size=32, metadata=torch.float32)
    assert isinstance(codec, Quantizer)
    states = torch.randn(2, 2, 128, head_dim) * 3 + 1
    parts = codec.encode(states)
    for name, part in codec.layout().items():
        assert parts[name].shape == (2, 2, 128 // codec.block_length, *part.shape)
        assert parts[name].dtype == part.dtype
    decoded = decode(codec, parts, 128)
    _, codes, scale, low = codec.quantizer.said[0]
    expected = codes.double() * scale.double()[..., None] + low.double()[..., None]
    # Each group is found again where its elements lie in the states, whatever the codec did in between.
    spread = expected.transpose(-1, -2) if granularity == "per_channel" else expected.flatten(-2)[..., :head_dim]
    torch.testing.assert_close(decoded.double(), spread.flatten(2, 3), atol=2e-5, rtol=1e-6)
    error = (decoded - states).abs()
    half_step = (scale / 2).max()
    assert error.max() <= half_step * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e4, 1e30, 3e36])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float16_metadata_keeps_its_bound_at_every_magnitude(bits, magnitude, offset):
    codec = make_codec(bits)
    states = (torch.randn(2, 2, 64, 64) + offset) * magnitude
    decoded = decode(codec, codec.encode(states), 64)
    _, codes, scale, low = codec.quantizer.said[0]
    exact = (codes.double() * scale.double()[..., None] + low.double()[..., None]).transpose(-1, -2).flatten(2, 3)
    reach = (scale * 2 ** (bits - 1)).double()
    mid = low.double() + reach
    bound = (2.0**-11 * (mid.abs() + reach) * (1 + 1e-3))[..., None].expand_as(codes).transpose(-1, -2).flatten(2, 3)
    error = (decoded.double() - exact).abs()
    assert (error <= bound + 2.0**-23 * exact.abs()).all()


def test_the_bound_catches_bfloat16_metadata():
    codec = make_codec(4, metadata=torch.bfloat16)
    states = torch.randn(2, 2, 64, 64) + 100
    decoded = decode(codec, codec.encode(states), 64)
    _, codes, scale, low = codec.quantizer.said[0]
    exact = (codes.double() * scale.double()[..., None] + low.double()[..., None]).transpose(-1, -2).flatten(2, 3)
    assert (decoded.double() - exact).abs().max() > 2.0**-11 * 110


def test_float16_without_its_exponent_would_overflow():
    codec = make_codec(4)
    parts = dict(codec.encode(torch.randn(2, 2, 64, 64) * 1e6))
    assert parts["exponent"].min() > 0
    parts["exponent"] = torch.zeros_like(parts["exponent"])
    assert decode(codec, parts, 64).abs().max() < 1e5


@pytest.mark.parametrize(("side", "granularity"), SIDES)
def test_constant_groups_come_back_exactly_enough(side, granularity):
    codec = make_codec(2, side, granularity, metadata=torch.float32)
    states = torch.full((2, 2, 64, 64), 3.7)
    assert torch.equal(decode(codec, codec.encode(states), 64), states)


def test_swapped_groups_are_noticed():
    codec = make_codec(8, "value", "per_token", head_dim=64, group_size=32, metadata=torch.float32)
    states = torch.randn(2, 2, 32, 64)
    parts = dict(codec.encode(states))
    assert (decode(codec, parts, 32) - states).abs().max() < 0.02
    parts["scale"] = parts["scale"].flip(-1)
    assert (decode(codec, parts, 32) - states).abs().max() > 0.02


def test_balanced_groups():
    assert balanced_group_length(80, 64) == 40
    assert balanced_group_length(67, 64) == 34
    assert balanced_group_length(64, 64) == 64
    assert balanced_group_length(48, 64) == 48


def test_the_states_are_left_alone():
    codec = make_codec()
    states = torch.randn(2, 2, 64, 64)
    before = states.clone()
    parts = codec.encode(states)
    assert torch.equal(states, before)
    assert all(part.untyped_storage().data_ptr() != states.untyped_storage().data_ptr() for part in parts.values())


@pytest.mark.parametrize("fault", ["dtype", "shape"])
def test_a_quantizer_outside_its_contract_is_refused(fault):
    codec = make_codec()
    original = codec.quantizer.encode

    def wrong(groups):
        codes, scale, offset = original(groups)
        return (codes.int(), scale, offset) if fault == "dtype" else (codes, scale[..., None], offset)

    codec.quantizer.encode = wrong
    with pytest.raises(QuantizerContractError, match=r"RoundToNearest\.encode returned"):
        codec.encode(torch.randn(2, 2, 64, 64))


@pytest.mark.parametrize("metadata", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_states_near_the_largest_number_stay_finite(bits, metadata):
    codec = make_codec(bits, metadata=metadata)
    states = torch.rand(2, 2, 64, 64) * 3.2e38 - 1.6e38
    decoded = decode(codec, codec.encode(states), 64)
    assert torch.isfinite(decoded).all()
    assert (decoded - states).abs().max() <= 3.2e38 / (2**bits - 1) / 2 * 1.01


def test_a_group_of_zeros_takes_no_precision_from_tiny_neighbours():
    codec = make_codec(4)
    states = torch.randn(2, 2, 64, 64) * 1e-20
    states[..., 5] = 0
    error = (decode(codec, codec.encode(states), 64) - states).abs().max()
    assert error < 1e-20
