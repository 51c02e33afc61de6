"""The core's rotation around backends that store a representation of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from kvq import KVQ, register_backend
from kvq.errors import ConfigError, QuantizerContractError
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, Part, clamp_to_dtype
from kvq.registry import BackendRegistry
from kvq.store.rotation import HadamardRotation
from kvq.testing import ContractCase
from kvq.testing.attention import measure_attention

ROTATED = {"rotation_k": "hadamard", "rotation_v": "hadamard"}
SEEDS = {"key": 0, "value": 1}
"""Seeds of the sides of layer 0."""


class Levels:
    """Four bits a number in an int8, with a scale a token: coarse enough for an outlier to cost all others."""

    block_length = 16
    group_local = True

    def __init__(self, spec):
        self.head_dim = spec.head_dim
        self.levels = torch.full((1,), 7.0)

    def layout(self):
        return {
            "codes": Part((self.block_length, self.head_dim), torch.int8),
            "scale": Part((self.block_length,), torch.float32),
        }

    def constants(self):
        return {"levels": self.levels}

    def encode(self, states):
        blocks = states.float().unflatten(2, (-1, self.block_length))
        scale = blocks.abs().amax(-1) / self.levels
        codes = blocks / scale.masked_fill(scale == 0, 1)[..., None]
        return {"codes": codes.round().nan_to_num(0).to(torch.int8), "scale": scale}

    def decode(self, parts):
        return (parts["codes"] * parts["scale"][..., None]).flatten(2, 3)

    def decode_into(self, parts, out):
        out.copy_(self.decode(parts))


class FusedLevels(Levels):
    """The same, which computes on its packed form and carries twice the values until the end."""

    def prepare_query(self, query):
        return query.float() * 3

    def scores(self, query, parts):
        states = self.decode(parts)
        return query / 3 @ states.repeat_interleave(query.shape[1] // states.shape[1], dim=1).mT

    def mix(self, probabilities, parts):
        states = self.decode(parts)
        return 2 * probabilities.float() @ states.repeat_interleave(probabilities.shape[1] // states.shape[1], dim=1)

    def finish_output(self, mixed):
        return mixed / 2


def spec_of(build):
    return BackendSpec("levels", API_VERSION, Capabilities(nbits=(8,)), build=lambda spec, options: build(spec))


def states_with_outliers(tokens=96, dtype=torch.float32):
    states = torch.randn(2, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(0))
    states[..., 5] *= 40
    return states.to(dtype)


def make(build=Levels, **fields):
    return KVQ(backend=spec_of(build), nbits_k=8, nbits_v=8, residual_length=0, sink_length=0, **fields)


def fill(cache, states):
    cache.update(*states, 0)
    return torch.stack(cache.materialize(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_backend_gets_rotated_states_and_its_own_are_turned_back(dtype):
    states = states_with_outliers(dtype=dtype)
    found = fill(make(**ROTATED), states)
    inner = Levels(type("Spec", (), {"head_dim": 64}))
    for place, side in enumerate(("key", "value")):
        rotation = HadamardRotation(64, SEEDS[side], torch.device("cpu"))
        parts = inner.encode(rotation.apply(states[place].float()).to(dtype))
        expected = rotation.undo(inner.decode(parts)).to(dtype)
        torch.testing.assert_close(found[place], expected, rtol=0, atol=0)


def test_an_outlier_channel_costs_the_others_less():
    states = states_with_outliers()
    plain, rotated = (((fill(make(**fields), states) - states)[..., :5]).square().mean() for fields in ({}, ROTATED))
    assert rotated < plain / 5


def test_auto_leaves_a_representation_of_its_own_as_it_is():
    states = states_with_outliers()
    none = fill(make(rotation_k="none", rotation_v="none"), states)
    assert torch.equal(fill(make(), states), none)
    assert not torch.equal(fill(make(**ROTATED), states), none)


def test_each_side_by_itself():
    states = states_with_outliers()
    both, none, keys = (fill(make(**fields), states) for fields in (ROTATED, {}, {"rotation_k": "hadamard"}))
    assert torch.equal(keys[0], both[0])
    assert torch.equal(keys[1], none[1])


def test_balance_is_refused():
    with pytest.raises(ConfigError, match="balance_k: levels stores its own representation, which the core cannot"):
        fill(make(balance_k="rms"), states_with_outliers())


@pytest.mark.parametrize("build", [Levels, FusedLevels])
def test_attention_reads_it(build):
    """In float64 on what is decoded: each kind of request, the last of them on rotated states."""
    case = ContractCase(spec_of(build), 8, Granularity.PER_TOKEN)
    errors = dict(measure_attention(case))
    assert len([way for way in errors if "rotated" in way]) >= 1
    assert max(errors.values()) < 1e-5


def test_a_lost_number_is_lost_where_it_is_spread():
    states = states_with_outliers()
    clean = fill(make(**ROTATED), states)
    for lost in (torch.nan, torch.inf):
        damaged = states.clone()
        damaged[0, 0, 1, 40, 3] = lost
        found = fill(make(**ROTATED), damaged)
        assert found[0, 0, 1, 40].isnan().all()
        found[0, 0, 1, 40], expected = 0, clean.clone()
        expected[0, 0, 1, 40] = 0
        assert torch.equal(found, expected)


def test_the_end_of_float16_stays_finite():
    states = torch.full((2, 1, 2, 32, 64), 65504.0, dtype=torch.float16)
    found = fill(make(**ROTATED), states)
    assert found.isfinite().all()


def test_long_stores_are_decoded_in_pieces_of_the_same_bits():
    states = states_with_outliers(tokens=9000)
    found = fill(make(**ROTATED), states)
    head = fill(make(**ROTATED), states[..., :64, :])
    assert torch.equal(found[..., :64, :], head)


def test_saved_copied_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("kvq.registry.registry._registry", BackendRegistry())
    register_backend(spec_of(Levels), replace=True)
    cache = KVQ(backend="levels", nbits_k=8, nbits_v=8, residual_length=0, sink_length=0, **ROTATED)
    states = states_with_outliers()
    expected = fill(cache, states)
    assert torch.equal(torch.stack(copy.deepcopy(cache).materialize(0)), expected)
    cache.save(tmp_path / "kept.kvq")
    loaded = KVQ.load(tmp_path / "kept.kvq")
    assert torch.equal(torch.stack(loaded.materialize(0)), expected)
    for one in (cache, loaded):
        one.update(*states_with_outliers(32), 0)
    assert torch.equal(torch.stack(loaded.materialize(0)), torch.stack(cache.materialize(0)))
    cache = KVQ(cache.config)
    fill(cache, states)
    plain = make()
    fill(plain, states)
    assert cache.memory().total_bytes - plain.memory().total_bytes == 2 * 64, "the signs, a byte an element and side"


def test_a_constant_of_the_rotations_name_is_refused():
    class Clashing(Levels):
        def constants(self):
            return {"rotation_signs": self.levels}

    with pytest.raises(QuantizerContractError, match="rotation_signs"):
        fill(make(Clashing, **ROTATED), states_with_outliers())


@pytest.mark.parametrize("fields", [{}, ROTATED], ids=["plain", "rotated"])
def test_constants_that_are_none_break_the_contract(fields):
    class Without(Levels):
        def constants(self):
            return None

    with pytest.raises(QuantizerContractError, match="constants returned a NoneType"):
        fill(make(Without, **fields), states_with_outliers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_backend_may_decode_in_the_dtype_of_the_states(dtype):
    """What it decodes into is float32 where the core turns states back."""

    class Narrow(Levels):
        def decode_into(self, parts, out):
            out.copy_(clamp_to_dtype(self.decode(parts).to(dtype), out.dtype))

    states = states_with_outliers(dtype=dtype)
    found, exact = (fill(make(build, **ROTATED), states).float() for build in (Narrow, Levels))
    assert (found - exact).square().mean() < 1e-4 * exact.square().mean()
