"""When C encodes, when torch does, and that code which is wrong is found out."""

import copy
import logging
import pickle

import pytest
import torch

from kvq import KVQ
from kvq.encoding import encoder, library
from kvq.encoding.encoder import CompiledEncoder
from kvq.encoding.library import EncodeLibrary, find_encode_library
from kvq.encoding.structure import EncodeRequest

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def calls(monkeypatch):
    """Count calls of the compiled code; `spoil` says what is done to the states before it sees them."""
    real, counted = find_encode_library(), []

    def encode(place):
        counted.append(place)
        return real.encode(place)

    monkeypatch.setattr(encoder, "find_encode_library", lambda: EncodeLibrary(encode, None))
    return counted


def draw_states(dtype=torch.float32, tokens=64):
    return torch.randn(1, 2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_code_that_makes_other_bytes_is_not_called_again(make_codec, monkeypatch, caplog, own_trust):
    counted, real = [], find_encode_library()

    def wrong(place):
        counted.append(place)
        request = EncodeRequest.from_address(place)
        request.clips, request.clip_margin = 1, 0.1
        return real.encode(place)

    monkeypatch.setattr(encoder, "find_encode_library", lambda: EncodeLibrary(wrong, None))
    codec, states = make_codec(), draw_states()
    expected = codec.encode_by_torch(states)
    with caplog.at_level(logging.WARNING, "kvq"):
        for _ in range(3):
            found = codec.encode(states)
            assert all(torch.equal(found[name], part) for name, part in expected.items())
    assert len(counted) == 1
    assert len(caplog.records) == 1
    assert "differs from what torch makes of the same float32 states" in caplog.text
    assert own_trust.fault


@pytest.mark.parametrize(("other", "is_trusted"), [(0x7FFF, True), (0xFE01, True), (0x7C00, False), (0x3C00, False)])
def test_any_nan_stands_for_no_number(make_codec, monkeypatch, own_trust, other, is_trusted):
    codec, states = make_codec(), draw_states()
    states[0, 0, 0, 3] = torch.nan
    expected = codec.encode_by_torch(states[:, :, : codec.block_length])
    lost = expected["mid"].isnan()
    assert 0 < lost.sum() < lost.numel()
    pattern = other - 0x10000 if other >= 0x8000 else other  # of an int16
    expected["mid"] = expected["mid"].view(torch.int16).masked_fill(lost, pattern).view(torch.float16)
    monkeypatch.setattr(codec, "encode_by_torch", lambda _: expected)
    assert (CompiledEncoder().encode(codec, states) is not None) is is_trusted
    assert (own_trust.fault is None) is is_trusted


def test_a_number_is_no_nan(make_codec, monkeypatch, own_trust):
    codec, states = make_codec(), draw_states()
    expected = codec.encode_by_torch(states[:, :, : codec.block_length])
    expected["mid"].view(-1)[3] = torch.nan
    monkeypatch.setattr(codec, "encode_by_torch", lambda _: expected)
    assert CompiledEncoder().encode(codec, states) is None
    assert own_trust.fault


def test_states_that_differ_are_found_out(make_codec, monkeypatch, caplog, own_trust):
    real = find_encode_library()

    def wrong(place):
        request = EncodeRequest.from_address(place)
        request.rotation_scale *= 1.5
        return real.encode(place)

    codec, states = make_codec(is_rotated=True), draw_states()
    parts = codec.encode(states)
    expected, found = torch.empty_like(states), torch.empty_like(states)
    codec.decode_by_torch(parts, expected)
    monkeypatch.setattr(encoder, "find_encode_library", lambda: EncodeLibrary(wrong, None))
    with caplog.at_level(logging.WARNING, "kvq"):
        codec.decode_into(parts, found)
    assert torch.equal(found, expected)
    assert "decoded float32 states differ" in caplog.text
    assert own_trust.fault


def test_each_kind_is_compared_once(make_codec, monkeypatch, calls):
    compared = []
    codec, other = make_codec(), make_codec(3)
    for one in (codec, other):
        by_torch = one.encode_by_torch
        monkeypatch.setattr(one, "encode_by_torch", lambda states, do=by_torch: compared.append(states) or do(states))
    for _ in range(3):
        codec.encode(draw_states())
    assert [tuple(states.shape) for states in compared] == [(1, 2, 32, 64)], "the first block of the first row"
    codec.encode(draw_states(torch.bfloat16))
    other.encode(draw_states())
    assert len(compared) == 3
    assert len(calls) == 5


def test_zeros_prove_nothing(make_codec, own_trust):
    codec = make_codec()
    codec.encode(torch.zeros(1, 2, 32, 64))
    assert not own_trust.agreed
    codec.encode(draw_states())
    assert own_trust.agreed


def test_what_it_does_not_serve_is_left_to_torch(make_codec, monkeypatch, calls):
    class Own(torch.Tensor):
        pass

    for states in (draw_states(torch.float64), draw_states().as_subclass(Own), draw_states().to("meta")):
        assert make_codec(dtype=states.dtype).encode(states).keys() == {"codes_4", "scale", "mid", "exponent"}
    make_codec(metadata=(torch.bfloat16, None)).encode(draw_states())
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "eager")
    make_codec().encode(draw_states())
    assert not calls
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "compiled")
    make_codec().encode(draw_states())
    assert calls


def test_no_memory_is_no_error(make_codec, monkeypatch, own_trust):
    monkeypatch.setattr(encoder, "find_encode_library", lambda: EncodeLibrary(lambda _place: 1, None))
    codec, states = make_codec(), draw_states()
    assert torch.equal(codec.encode(states)["codes_4"], codec.encode_by_torch(states)["codes_4"])
    assert own_trust.fault is None


def test_a_missing_compiler_is_one_line_in_the_log(make_codec, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("KVQ_CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load_once.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "kvq"):
            codec = make_codec()
            assert codec.encode(draw_states())["codes_4"].shape == (1, 2, 2, 64, 16)
            codec.encode(draw_states())
        assert [record.message for record in caplog.records if "quantizing" in record.message] == [
            "quantizing on the CPU does without its compiled code and is several times slower: the C compiler "
            "'no-such-compiler', which the variable KVQ_CC names, is not there"
        ]
        assert "no-such-compiler" in library.why_encode_unavailable()
    finally:
        library._load_once.cache_clear()


def test_copies_have_encoders_of_their_own(make_codec):
    codec, states = make_codec(is_rotated=True), draw_states()
    expected = codec.encode(states)
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):  # noqa: S301  # made here
        assert isinstance(other.encoder, CompiledEncoder)
        assert other.encoder is not codec.encoder
        other.rotation.signs.neg_()
        assert not torch.equal(other.encode(states)["codes_4"], expected["codes_4"])
    assert torch.equal(codec.encode(states)["codes_4"], expected["codes_4"])


@pytest.mark.parametrize("backend", ["native", "quanto", "hqq"])
def test_a_cache_stores_the_same_bytes_without_it(monkeypatch, backend):
    stored = []
    for kernel in ("eager", "auto"):
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", kernel)
        cache = KVQ(backend=backend, nbits_k=4, nbits_v=2, residual_length=32, q_group_size=32)
        generator = torch.Generator().manual_seed(0)
        for tokens in (150, 1, 60):
            cache.update(*torch.randn(2, 2, 2, tokens, 64, generator=generator), 0)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.layers[0].side("key").store.length == 160
        segments = [segment for _, side in cache.layers[0].sides() for segment in side.store.segments]
        parts = [part for segment in segments for part in segment.read(0, segment.used).values()]
        stored.append([*parts, *cache.materialize(0)])
    assert stored[0]
    assert all(torch.equal(one, other) for one, other in zip(*stored, strict=True))
