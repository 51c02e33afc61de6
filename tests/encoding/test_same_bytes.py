"""Blocks that C encodes have the bytes that torch gives them, whatever the format and the numbers."""

import numpy as np
import pytest
import torch

from kvq.encoding import request as requests
from kvq.encoding.encoder import CompiledEncoder
from kvq.plugin_api import Granularity
from kvq_backends.native.quantizer import NativeQuantizer

pytestmark = pytest.mark.usefixtures("compiled")
SHAPES = [(side, granularity) for side in ("key", "value") for granularity in Granularity]


class Rounded:
    """A quantizer of somebody else, which is called between the two halves."""

    group_local = True

    def __init__(self, bits):
        self.bits = bits
        self.given = []

    def encode(self, groups):
        self.given.append(groups.clone())
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / (2**self.bits - 1)
        codes = ((groups - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round().clamp(0, 2**self.bits - 1)
        return codes.to(torch.uint8), scale, low


def bytes_of(part):
    """Return the bytes of a part with one NaN for all: torch 2.6 writes several, by the place in a vector."""
    numbers = part.contiguous().numpy().copy()
    if np.issubdtype(numbers.dtype, np.floating):
        numbers[np.isnan(numbers)] = np.nan
    return numbers.tobytes()


def assert_same(codec, states):
    found = CompiledEncoder().encode(codec, states)
    assert found is not None
    expected = codec.encode_by_torch(states)
    assert found.keys() == expected.keys() == codec.layout().keys()
    for name, part in expected.items():
        assert found[name].dtype == part.dtype
        assert found[name].shape == part.shape
        assert bytes_of(found[name]) == bytes_of(part), name
    return found


@pytest.mark.parametrize("seed", range(4))
def test_of_drawn_formats_and_states(draw, make_codec, seed):
    for options, states in draw(seed, 60):
        assert_same(make_codec(**options), states)


@pytest.mark.parametrize("seed", range(2))
def test_with_a_quantizer_between_both_halves(draw, make_codec, seed):
    for options, states in draw(100 + seed, 60):
        assert_same(make_codec(**options, quantizer=Rounded(options["bits"])), states)


def draw_moment(heads, head_dim, seed):
    """Second moments of queries that go together, of any size."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, 150, head_dim, generator=generator)
    queries = queries @ torch.randn(heads, head_dim, head_dim, generator=generator) * 10.0 ** (seed % 7 - 3)
    return queries.mT @ queries / 150


@pytest.mark.parametrize("seed", range(3))
def test_with_error_feedback(draw, make_codec, seed):
    for number, (options, states) in enumerate(draw(200 + seed, 50)):
        moment = draw_moment(options["heads"], options["head_dim"], number)
        assert_same(make_codec(**{**options, "side": "key"}, query_moment=moment), states)


def test_error_feedback_of_another_quantizer_is_left_to_torch(make_codec):
    codec = make_codec(quantizer=Rounded(4), query_moment=draw_moment(2, 64, 0))
    assert CompiledEncoder().encode(codec, torch.randn(1, 2, 32, 64)) is None


@pytest.mark.parametrize(("side", "granularity"), SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_at_every_width(make_codec, bits, side, granularity):
    states = torch.randn(2, 2, 64, 80, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    per_channel = granularity is Granularity.PER_CHANNEL
    codec = make_codec(bits, side, granularity, 80, is_rotated=True, balanced=per_channel, clip_share=0.9)
    assert_same(codec, states)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("side", "granularity"), SHAPES)
def test_no_state_is_off_by_more_than_half_a_step(make_codec, bits, side, granularity):
    """Worked out in fp64 from the states alone, not by the code under test nor by torch's path."""
    metadata = (torch.float32, torch.float32)
    codec = make_codec(bits, side, granularity, 64, metadata=metadata)
    states = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    restored = torch.empty_like(states)
    codec.decode_into(CompiledEncoder().encode(codec, states), restored)
    exact, found = states.double().numpy(), restored.double().numpy()
    axis, cut = (2, (2, 2, 2, 32, 64)) if granularity is Granularity.PER_CHANNEL else (3, (2, 2, 64, 2, 32))
    axis, exact, found = (3 if axis == 2 else 4), exact.reshape(cut), found.reshape(cut)
    half_step = np.ptp(exact, axis=axis, keepdims=True) / (2**bits - 1) / 2
    error = np.abs(found - exact) / half_step
    assert error.max() < 1 + 1e-5
    assert error.max() > 0.9, "the bound would not notice a step that is too fine"


def test_what_a_quantizer_is_given_is_what_torch_would_give_it(make_codec):
    states = torch.randn(1, 2, 64, 67, generator=torch.Generator().manual_seed(0)) * 2
    states[0, 0, 3, 5] = torch.nan
    for side, granularity in SHAPES:
        rounded = Rounded(4)
        codec = make_codec(4, side, granularity, 67, quantizer=rounded)
        CompiledEncoder().encode(codec, states)
        codec.encode_by_torch(states)
        by_c, by_torch = rounded.given[0], rounded.given[-1]
        assert torch.equal(by_c, by_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_decoded_states_are_those_of_torch(draw, make_codec, own_trust, seed, dtype):
    """Into any place, from any run of the blocks of a chunk, and nowhere else."""
    for options, states in draw(200 + seed, 60):
        codec = make_codec(**options)
        blocks = states.shape[2] // codec.block_length
        parts = {name: part.contiguous()[:, :, blocks // 2 :] for name, part in codec.encode_by_torch(states).items()}
        batch, heads, _, dim = states.shape
        tokens = (blocks - blocks // 2) * codec.block_length
        expected = torch.empty(batch, heads, tokens, dim, dtype=dtype)
        room = torch.full((batch, heads + 1, tokens + 5, dim + 3), 7.0, dtype=dtype)
        found = room[:, :heads, 2 : 2 + tokens, 1 : 1 + dim]
        codec.decode_by_torch(parts, expected)
        own_trust.agreed.add(("decoding", codec.packed_format, dtype))
        assert codec.encoder.decode_into(codec, parts, found)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        found.fill_(7)
        assert (room == 7).all()


def test_parts_that_lie_in_another_way_are_left_to_torch(make_codec, own_trust):
    codec, states = make_codec(), torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    parts = codec.encode(states)
    expected, found = torch.empty_like(states), torch.empty_like(states)
    codec.decode_by_torch(parts, expected)
    for name in ("codes_4", "scale"):
        turned = {
            **parts,
            name: parts[name].mT.contiguous().mT if name == "codes_4" else parts[name].expand(2, -1, -1, -1)[:1],
        }
        assert torch.equal(turned[name], parts[name])
        codec.decode_into(turned, found.zero_())
        assert torch.equal(found, expected)
    assert not codec.encoder.decode_into(codec, {**parts, "codes_4": parts["codes_4"].mT.contiguous().mT}, found)
    assert not codec.encoder.decode_into(codec, parts, found.mT.contiguous().mT)
    assert own_trust.fault is None, "they are not tried first"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(make_codec, monkeypatch, threads):
    monkeypatch.setattr(requests, "MIN_PARALLEL_ELEMENTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    states = torch.randn(2, 3, 160, 48, generator=torch.Generator().manual_seed(0))
    assert_same(make_codec(3, "value", Granularity.PER_CHANNEL, 48, heads=3, is_rotated=True, balanced=True), states)


def test_any_strides(make_codec):
    drawn = torch.randn(70, 3, 48, 4, generator=torch.Generator().manual_seed(0))
    layouts = drawn[:64].permute(3, 1, 0, 2), drawn[:64, :, :40].expand(-1, -1, -1, 4).permute(3, 1, 0, 2)
    for states in (*layouts, layouts[0][1:, ::2, :32]):
        codec = make_codec(head_dim=states.shape[3], heads=states.shape[1])
        before = states.clone()
        assert_same(codec, states)
        assert torch.equal(states, before)


@pytest.mark.parametrize("shape", [(0, 2, 32, 64), (1, 2, 0, 64)])
def test_nothing_at_all(make_codec, shape):
    assert_same(make_codec(), torch.empty(shape))


def test_no_other_number_takes_the_place_of_a_lost_group(make_codec):
    states = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    states[0, 0, 40, 7] = torch.inf
    codec = make_codec(heads=1)
    restored = torch.empty_like(states)
    codec.decode_into(assert_same(codec, states), restored)
    assert restored[0, 0, 32:, 7].isnan().all()
    restored[0, 0, 32:, 7] = 0
    assert restored.isfinite().all()


def test_a_search_for_a_better_line_is_left_to_the_quantizer(make_codec):
    searching = NativeQuantizer(2, clip_candidates=4)
    assert not searching.rounds_to_nearest
    states = torch.randn(1, 2, 32, 64, generator=torch.Generator().manual_seed(0)).pow(3)
    found = assert_same(make_codec(2, quantizer=searching), states)
    plain = assert_same(make_codec(2), states)
    assert not torch.equal(found["codes_2"], plain["codes_2"])
