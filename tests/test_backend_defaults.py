"""What a backend proposes: which fields get it, what wins over it, and what is left once a configuration is built."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from kvq import KVQ, KVQCacheConfig, register_backend
from kvq.cli.backend_facts import describe_spec
from kvq.cli.sample_block import plain_settings
from kvq.config.layer_config import CLIP_FIELDS, SIDE_OF_FIELD
from kvq.errors import BrokenBackendError
from kvq.plugin_api.backend_spec import DEFAULT_FIELDS
from kvq.plugin_api.granularity import Granularity

ALL = {
    "nbits_k": 8,
    "nbits_v": 5,
    "axis_key": "per_token",
    "axis_value": "per_channel",
    "q_group_size": {"key": 32, "value": 16},
    "rotation_k": "hadamard",
    "rotation_v": "none",
    "balance_k": "none",
    "balance_v": "rms",
    "clip_k": 0.9,
    "clip_v": "none",
}


@pytest.fixture
def propose(testing_backend):
    def make(name="proposing", **fields):
        spec = dataclasses.replace(testing_backend, name=name, **fields)
        register_backend(spec, replace=True)
        return spec

    return make


def fields_of(config, names=ALL):
    return {name: config.to_dict()[name] for name in names}


def test_what_nobody_sets_is_what_the_backend_proposes(propose):
    propose(defaults=ALL)
    assert fields_of(KVQCacheConfig(backend="proposing")) == ALL
    assert fields_of(KVQCacheConfig.from_mapping({"backend": "proposing"})) == ALL
    assert fields_of(KVQ(backend="proposing").config) == ALL


def test_every_quantization_field_of_a_side_can_be_proposed():
    assert {*SIDE_OF_FIELD, *CLIP_FIELDS.values(), "q_group_size"} == set(DEFAULT_FIELDS) == set(ALL)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(("rotation", "balance", "clip"))])
def test_what_is_set_wins(propose, name):
    propose(defaults=ALL)
    own = {"nbits_k": 7, "nbits_v": 7, "axis_key": "per_channel", "axis_value": "per_token", "q_group_size": 48}[name]
    config = KVQCacheConfig(backend="proposing", **{name: own})
    side = SIDE_OF_FIELD.get(name, "")
    steps = {f"{step}_{side[:1]}" for step in ("rotation", "balance", "clip")} if name.startswith("axis") else set()
    assert fields_of(config) == ALL | {name: own} | dict.fromkeys(steps, "auto"), "a step may not go with another axis"


def test_a_preset_wins(propose):
    propose(defaults=ALL)
    config = KVQCacheConfig(preset="4bit", backend="proposing")
    assert (config.nbits_k, config.nbits_v, config.q_group_size) == (4, 4, 64)
    assert str(config.axis_key) == "per_channel"


def test_each_side_gets_what_its_own_backend_proposes(propose, testing_backend):
    propose(defaults=ALL)
    config = KVQCacheConfig(backend={"key": "proposing", "value": testing_backend.name})
    plain = KVQCacheConfig(backend=testing_backend.name)
    for name, side in SIDE_OF_FIELD.items():
        assert str(getattr(config, name)) == str(ALL[name] if side == "key" else getattr(plain, name))
    assert (config.q_group_size.key, config.q_group_size.value) == (32, 64)


def test_an_entry_of_layers_takes_what_it_does_not_set_from_the_cache(propose, testing_backend):
    propose(defaults=ALL)
    own = KVQCacheConfig(backend=testing_backend.name, layers={0: {"backend": "proposing"}}).for_layer(0)
    assert (own.key.nbits, own.value.nbits, own.key.group_size) == (4, 2, 64)


def test_a_layer_of_another_direction_is_not_balanced_by_a_proposal(propose):
    propose(defaults=ALL)
    config = KVQCacheConfig(backend="proposing", layers={0: {"axis_value": "per_token"}})
    assert (config.rotation_k, config.balance_v) == ("auto", "auto")


@pytest.mark.case("A file was written, then the plugin proposes something else", "the file keeps its meaning")
def test_what_was_written_keeps_its_meaning(propose):
    propose(defaults=ALL)
    config = KVQCacheConfig(backend="proposing")
    written = config.to_dict()
    propose(defaults={"nbits_k": 2, "axis_key": "per_channel", "q_group_size": 128})
    assert KVQCacheConfig.from_mapping(written).to_dict() == written
    assert KVQCacheConfig(backend="proposing").nbits_k == 2


def test_a_file_from_before_balance_is_not_filled_up(propose):
    propose(defaults=ALL)
    older = KVQCacheConfig(backend="proposing", axis_value="per_token").to_dict()
    younger = ("balance_k", "balance_v", "clip_k", "clip_v")
    for name in younger:
        del older[name]
    assert fields_of(KVQCacheConfig.from_mapping(older), younger) == dict.fromkeys(younger, "none")


@pytest.mark.parametrize(
    ("defaults", "told"),
    [
        ({"nbits_k": 9}, "nbits_k=9, which is none of 1, 2"),
        ({"nbits_k": True}, "nbits_k=True"),
        ({"axis_key": 0}, "axis_key=0, which is none of per_token, per_channel"),
        ({"rotation_k": "random"}, "rotation_k='random', which is none of auto, none, hadamard"),
        ({"clip_k": 1.5}, "clip_k=1.5, which is not between 0 and 1"),
        ({"clip_k": "mse"}, "clip_k='mse', which is none of auto, none"),
        ({"q_group_size": 12}, "q_group_size=12, which is no multiple of 8"),
        ({"q_group_size": {"key": 64}}, "q_group_size={'key': 64}"),
        ({"residual_length": 0}, "residual_length=0, which is none of nbits_k"),
        ({"balance_k": "rms", "axis_key": "per_token"}, "balance_k='rms', which does not fit axis_key='per_token'"),
        ("4", "defaults='4' is not a mapping"),
    ],
)
def test_a_faulty_proposal_is_a_fault_of_the_backend(testing_backend, defaults, told):
    with pytest.raises(BrokenBackendError) as caught:
        KVQCacheConfig(backend=dataclasses.replace(testing_backend, name="faulty", defaults=defaults))
    assert told in str(caught.value)


class TestGroupSize:
    def test_one_that_changes_nothing_warns(self, propose):
        propose(uses_group_size=False)
        with pytest.warns(UserWarning, match="^q_group_size=32 has no effect: backend 'proposing'"):
            KVQCacheConfig(backend="proposing", q_group_size=32)
        with pytest.warns(UserWarning, match=r"layers\['0'\]\.q_group_size=32 has no effect"):
            KVQCacheConfig(backend="proposing", layers={0: {"q_group_size": 32}})

    def test_each_side_is_judged_by_its_own_backend(self, propose, testing_backend):
        propose(uses_group_size=False)
        both = {"key": "proposing", "value": testing_backend.name}
        with pytest.warns(UserWarning, match="^q_group_size.key=32 has no effect"):
            KVQCacheConfig(backend=both, q_group_size={"key": 32, "value": 16})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            KVQCacheConfig(backend=both, q_group_size=32)
            KVQCacheConfig.from_mapping(KVQCacheConfig(backend="proposing").to_dict())

    def test_a_proposal_beside_it_is_a_fault(self, testing_backend):
        spec = dataclasses.replace(testing_backend, name="faulty", uses_group_size=False, defaults={"q_group_size": 64})
        with pytest.raises(BrokenBackendError, match="q_group_size=64, but uses_group_size is False"):
            KVQCacheConfig(backend=spec)


def test_a_proposal_reaches_the_store(propose):
    propose(defaults={"nbits_k": 8, "nbits_v": 1, "q_group_size": 32, "axis_key": "per_token"})
    cache = KVQ(backend="proposing", rotation_k="none", rotation_v="none", residual_length=0, sink_length=0)
    states = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    keys, values = cache.materialize(0)
    assert (keys - states).abs().max() < 0.05 < (values - states).abs().max()


def test_the_command_shows_what_holds(propose):
    facts = describe_spec(propose(defaults={"nbits_k": 8, "q_group_size": {"key": 32, "value": 64}}))
    assert facts["defaults"] == {"nbits_k": 8, "q_group_size": {"key": 32, "value": 64}}
    assert (facts["group_size"], facts["uses_group_size"]) == ({"key": 32, "value": 64}, True)
    facts = describe_spec(propose(defaults={"axis_key": Granularity.PER_TOKEN}, uses_group_size=False))
    assert (facts["defaults"], facts["group_size"]) == ({"axis_key": "per_token"}, None)


def test_bits_are_measured_with_the_groups_that_a_user_would_get(propose):
    settings = plain_settings(propose(defaults={"q_group_size": {"key": 32, "value": 128}}), 4, Granularity.PER_CHANNEL)
    assert (settings.key.group_size, settings.value.group_size) == (32, 128)
