"""The configuration in memory: fields, faults, layers, and what stays fixed once it is built."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kvq.config import KeyValue, KVQCacheConfig, LayerConfig
from kvq.config import backend_limits as limits
from kvq.errors import BackendError, BrokenBackendError, ConfigError, KVQError, UnknownBackendError
from kvq.plugin_api import Capabilities, Granularity
from kvq.registry import register_backend

pytestmark = pytest.mark.usefixtures("testing_backend")


def make_config(**fields):
    return KVQCacheConfig(**{"backend": "testing", **fields})


def refusal(**fields) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(**fields)
    assert len(caught.value.faults) == 1, caught.value
    return str(caught.value)


def refused_paths(**fields) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config(**fields)
    return [fault.location for fault in caught.value.faults]


class TestNumbers:
    @pytest.mark.parametrize("value", ["x", "64", True, 64.0, 1, None, math.nan, [64]])
    def test_a_group_size_that_is_none_is_refused_in_one_line(self, value):
        accepted = "an integer of at least 2, or {key: ..., value: ...}"
        assert refusal(q_group_size=value) == f"q_group_size: {value!r} is not accepted: {accepted}"

    @pytest.mark.parametrize("field", ["residual_length", "sink_length"])
    @pytest.mark.parametrize("value", ["128", False, 128.0, -1, None, math.inf])
    def test_a_number_of_tokens_that_is_none_is_refused_in_one_line(self, field, value):
        expected = f"{field}: {value!r} is not accepted: an integer of at least 0 (tokens)"
        assert refusal(**{field: value}) == expected

    @pytest.mark.parametrize("value", ["4", True, 0, -2, None, math.nan, math.inf, -math.inf])
    def test_bits_that_are_none_are_refused_in_one_line(self, value):
        expected = f"nbits_v: {value!r} is not accepted: a finite number of bits above 0, such as 4"
        assert refusal(nbits_v=value) == expected

    def test_bits_that_the_backend_lacks_are_refused_with_its_choices(self):
        message = refusal(nbits_k=3.5)
        assert message == (
            "nbits_k: 3.5 is not supported by backend 'testing'; choose one of 1, 2, 2.5, 3, 4, 5, 6, 7, 8"
        )

    def test_whole_bits_become_integers_and_fractional_ones_stay(self):
        config = make_config(nbits_k=4.0, nbits_v=2.5)
        assert (config.nbits_k, type(config.nbits_k)) == (4, int)
        assert config.nbits_v == 2.5

    def test_integers_of_other_libraries_become_plain_ones(self):
        config = make_config(nbits_k=np.int64(8), q_group_size=np.int32(32), residual_length=np.int16(0))
        assert [type(n) for n in (config.nbits_k, config.q_group_size, config.residual_length)] == [int] * 3

    def test_a_group_size_beyond_the_limit_is_refused(self):
        assert refusal(q_group_size=10**6) == "q_group_size: 1000000 is not accepted: at most 65536"

    @pytest.mark.parametrize("value", [2, "1", True, 1.0])
    def test_only_this_version_of_the_format_is_read(self, value):
        assert refusal(version=value).startswith(f"version: {value!r} is not accepted: 1, the version")

    def test_a_long_value_is_cut_in_the_message(self):
        assert len(refusal(residual_length=list(range(10_000)))) < 200


class TestBothSides:
    def test_each_side_has_its_own(self):
        config = make_config(q_group_size={"key": 64, "value": 32})
        assert config.q_group_size == KeyValue(key=64, value=32)
        layer = config.for_layer(0)
        assert (layer.key.group_size, layer.value.group_size) == (64, 32)

    @pytest.mark.parametrize("value", [{"key": 64}, {}, {"key": 64, "value": 64, "both": 64}])
    def test_a_pair_has_exactly_two_sides(self, value):
        assert refusal(q_group_size=value).endswith("or exactly {key: ..., value: ...}")

    def test_faults_of_a_pair_name_the_side_and_nothing_of_pydantic(self):
        paths = refused_paths(q_group_size={"key": "x", "value": True}, backend={"key": 5, "value": None})
        assert paths == ["backend.key", "backend.value", "q_group_size.key", "q_group_size.value"]

    def test_two_equal_sides_are_one(self):
        pairs = make_config(
            q_group_size=KeyValue(key=64, value=64),
            backend={"key": "testing", "value": "testing"},
            layers={"0": {"q_group_size": {"key": 32, "value": 32}}},
        )
        assert pairs == make_config(q_group_size=64, layers={0: {"q_group_size": 32}})

    @pytest.mark.parametrize(
        ("group_size", "path"),
        [(12, "q_group_size"), ({"key": 12, "value": 64}, "q_group_size.key")],
    )
    def test_per_channel_groups_fill_whole_bytes(self, group_size, path):
        assert refused_paths(q_group_size=group_size, axis_value="per_token") == [path]
        fitting = make_config(q_group_size=group_size, axis_key="per_token", axis_value="per_token")
        assert fitting.axis_key == "per_token"

    def test_each_side_of_per_channel_groups_is_checked(self):
        assert refused_paths(q_group_size=12) == ["q_group_size"] * 2
        assert refused_paths(q_group_size={"key": 64, "value": 12}) == ["q_group_size.value"]


class TestAxes:
    def test_integers_become_the_words_of_the_backend(self, testing_backend):
        flipped = {0: Granularity.PER_CHANNEL, 1: Granularity.PER_TOKEN}
        spec = dataclasses.replace(testing_backend, name="testing-flipped", axis_names=flipped)
        register_backend(spec, replace=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = make_config(backend="testing-flipped", axis_key=0, axis_value=1)
        assert (config.axis_key, config.axis_value) == (Granularity.PER_CHANNEL, Granularity.PER_TOKEN)
        assert make_config(axis_key=-1, axis_value=-1) == make_config()
        assert make_config(axis_value=0) == make_config(axis_value="per_token")

    def test_a_meaning_that_differs_warns_once_at_the_callers_line(self, testing_backend, monkeypatch):
        monkeypatch.setattr(limits, "_warned_axes", set())
        spec = dataclasses.replace(testing_backend, name="testing-flipped", axis_names={0: Granularity.PER_CHANNEL})
        register_backend(spec, replace=True)
        with pytest.warns(UserWarning, match="axis_key=0 means per_channel to backend 'testing-flipped'") as caught:
            make_config(backend="testing-flipped", axis_key=0)
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_config(backend="testing-flipped", axis_key=0)

    def test_an_integer_without_meaning_is_refused_with_the_ones_that_have_one(self):
        assert refusal(axis_key=1) == (
            "axis_key: 1 is not an axis of backend 'testing'; "
            "choose one of 0 (per_token), -1 (per_channel), 'per_token', 'per_channel'"
        )

    @pytest.mark.parametrize("value", [True, 0.0, "0", "per-token", None])
    def test_what_is_no_axis_is_refused(self, value):
        accepted = "'per_token', 'per_channel', or an integer axis of the backend's own library"
        assert refusal(axis_value=value) == f"axis_value: {value!r} is not accepted: {accepted}"

    def test_a_granularity_that_the_backend_lacks_is_refused(self, testing_backend):
        one_way = Capabilities(nbits=(2, 4), granularities=(Granularity.PER_TOKEN,))
        spec = dataclasses.replace(testing_backend, name="testing-one-way", capabilities=one_way)
        message = refusal(backend=spec, axis_value="per_token")
        assert message == (
            "axis_key: 'per_channel' is not supported by backend 'testing-one-way'; choose one of 'per_token'"
        )


class TestDtypesAndDevices:
    @pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16])
    def test_a_dtype_may_be_written_as_text(self, value):
        assert make_config(compute_dtype=value).compute_dtype is torch.bfloat16

    @pytest.mark.parametrize("value", ["bf16", "uint8", torch.float64, 16, True])
    def test_other_dtypes_are_refused(self, value):
        accepted = "'float16', 'bfloat16', 'float32'"
        assert refusal(compute_dtype=value) == f"compute_dtype: {value!r} is not accepted: {accepted}"
        assert refusal(metadata_dtype=value) == f"metadata_dtype: {value!r} is not accepted: {accepted}, 'int8'"

    def test_bytes_are_for_metadata_alone(self):
        assert make_config(metadata_dtype="int8").metadata_dtype is torch.int8
        assert "'int8' is not accepted" in refusal(compute_dtype="int8")

    def test_a_device_may_be_written_as_text(self):
        assert make_config(device="cuda:1").device == torch.device("cuda", 1)

    @pytest.mark.parametrize("value", ["gpu", "", "cuda:-1", "cuda:300", "meta", True, 1.5])
    def test_what_is_no_device_is_refused(self, value):
        assert refusal(device=value).startswith(f"device: {value!r} is not accepted: a device of torch")


class TestWords:
    @pytest.mark.parametrize("value", ["Hadamard", False, None, 1])
    def test_rotations(self, value):
        assert refusal(rotation_k=value) == f"rotation_k: {value!r} is not accepted: 'auto', 'none' or 'hadamard'"

    @pytest.mark.parametrize("value", ["RMS", "sinkhorn", True, None])
    def test_balance(self, value):
        assert refusal(balance_v=value) == f"balance_v: {value!r} is not accepted: 'auto', 'none' or 'rms'"

    def test_balance_is_for_groups_along_tokens(self):
        why = "'rms' does not fit 'per_token' groups, whose scales are those of single tokens already"
        refused = f"{why}; choose 'none', or 'per_channel' groups"
        assert refusal(balance_k="rms", axis_key="per_token") == f"balance_k: {refused}"
        layer = {"axis_value": "per_token"}
        found = refusal(axis_value="per_channel", balance_v="rms", layers={1: layer})
        assert found == f"layers['1'].balance_v: {refused}"
        assert make_config(axis_value="per_channel", balance_v="rms", layers={1: {**layer, "balance_v": "none"}})

    def test_sliding(self):
        assert refusal(sliding="drop") == "sliding: 'drop' is not accepted: 'keep' or 'quantize'"


class TestUnknownFields:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [("nbits", "'nbits_k' or 'nbits_v'"), ("group_size", "'q_group_size'"), ("axis", "'axis_key' or 'axis_value'")],
    )
    def test_what_was_meant_is_guessed(self, name, meant):
        assert refusal(**{name: 4}) == f"{name}: is unknown; did you mean {meant}?"

    def test_the_fields_of_a_layer_are_guessed_too(self):
        assert refusal(layers={"0": {"residual": 4}}) == (
            "layers['0'].residual: is unknown; did you mean 'residual_length'?"
        )

    def test_all_fields_are_listed_where_nothing_is_near(self):
        message = refusal(zzz=4)
        assert all(name in message for name in KVQCacheConfig.model_fields)


def test_every_fault_is_told_at_once():
    layers = {"0": {"nbits_k": 9, "axis_value": 7}, "5-2": {}, "1": {"sink_length": -1}}
    paths = refused_paths(nbits_k="x", residual_length=1.5, device="gpu", layers=layers, bits=2)
    assert paths == ["nbits_k", "residual_length", "device", "layers['1'].sink_length", "bits"]
    del layers["1"]
    assert refused_paths(layers=layers) == ["layers['0'].nbits_k", "layers['0'].axis_value", "layers['5-2']"]


class TestBackends:
    def test_a_backend_that_cannot_be_had_raises_its_own_error(self):
        with pytest.raises(UnknownBackendError, match="'testin' is unknown; did you mean 'testing'") as caught:
            make_config(backend="testin")
        assert not isinstance(caught.value, ConfigError)

    def test_one_missing_backend_is_one_fault_wherever_it_is_named(self):
        with pytest.raises(UnknownBackendError):
            make_config(backend="absent", backend_options={"absent": {}}, layers={"0": {"backend": "absent"}})

    def test_with_another_fault_it_is_one_of_the_faults(self):
        with pytest.raises(ConfigError) as caught:
            make_config(backend="absent", sink_length=-1)
        assert [fault.location for fault in caught.value.faults] == ["backend", "sink_length"]
        assert isinstance(caught.value.faults[0].cause, UnknownBackendError)

    def test_two_missing_backends_are_two_faults(self):
        assert refused_paths(backend={"key": "absent", "value": "gone"}) == ["backend.key", "backend.value"]

    def test_the_reason_why_a_backend_is_broken_stays_its_cause(self, monkeypatch):
        reason = OSError("no such library")

        def raise_broken(name):
            raise BrokenBackendError(f"{name} is broken") from reason

        monkeypatch.setattr(
            "kvq.config.backend_choice.get_registry", lambda: type("R", (), {"get_backend": raise_broken})
        )
        with pytest.raises(BrokenBackendError) as caught:
            make_config()
        assert caught.value.__cause__ is reason

    def test_sides_may_have_different_backends(self, testing_backend):
        few = dataclasses.replace(testing_backend, name="testing-few", capabilities=Capabilities(nbits=(2,)))
        register_backend(few, replace=True)
        layer = make_config(backend={"key": "testing", "value": "testing-few"}).for_layer(0)
        assert (layer.key.backend.name, layer.value.backend.name) == ("testing", "testing-few")
        assert refused_paths(backend={"key": "testing-few", "value": "testing"}) == ["nbits_k"]

    def test_a_registered_object_is_the_same_as_its_name(self, testing_backend):
        assert make_config(backend=testing_backend) == make_config()
        assert make_config(backend={"key": testing_backend, "value": "testing"}) == make_config()

    def test_an_object_need_not_be_registered(self, testing_backend):
        spec = dataclasses.replace(testing_backend, name="testing-object")
        config = make_config(backend=spec, backend_options={"testing-object": {"rounds": 3}})
        assert config.for_layer(0).key.backend is spec
        assert config.for_layer(0).value.options.rounds == 3

    def test_an_object_that_is_not_valid_is_refused(self, testing_backend):
        with pytest.raises(BrokenBackendError, match="plugin API 99"):
            make_config(backend=dataclasses.replace(testing_backend, api_version=99))

    @pytest.mark.parametrize("value", [5, True, None, "", ["testing"]])
    def test_what_is_no_backend_is_refused(self, value):
        assert refusal(backend=value).startswith(f"backend: {value!r} is not accepted: the name of a backend")


class TestBackendOptions:
    def test_they_reach_the_layer_validated(self):
        options = make_config(backend_options={"testing": {"rounds": "3"}}).for_layer(0).key.options
        assert options.rounds == 3

    def test_equal_options_are_equal_however_written(self):
        one = make_config(backend_options={"testing": {"rounds": "3", "thresholds": [1]}})
        assert one == make_config(backend_options={"testing": {"thresholds": (1.0,), "rounds": 3}})
        assert one != make_config(backend_options={"testing": {"rounds": 3}})

    def test_faults_are_those_of_the_backends_own_model(self):
        options = {"testing": {"rounds": "x", "round": 1, "thresholds": [0, "y"]}}
        prefix = "backend_options.testing."
        expected = [prefix + "rounds", prefix + "thresholds[1]", prefix + "round"]
        assert refused_paths(backend_options=options) == expected

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_must_be_finite(self, value):
        message = refusal(backend_options={"testing": {"thresholds": [0.5, value]}})
        assert message == f"backend_options.testing.thresholds[1]: {value!r} is not accepted: a finite number"

    def test_a_mapping_that_holds_itself_is_refused(self):
        endless: dict = {}
        endless["rounds"] = endless
        assert "flatten" in refusal(backend_options={"testing": endless})

    def test_options_of_an_absent_backend_are_refused(self):
        with pytest.raises(UnknownBackendError, match="absent"):
            make_config(backend_options={"absent": {}})

    def test_they_are_not_a_list(self):
        assert refusal(backend_options={"testing": [1]}) == "backend_options.testing: [1] is not accepted: a mapping"


class TestLayers:
    def test_an_index_beats_a_range_and_a_range_beats_the_ends(self):
        config = make_config(
            layers={
                "first:4": {"residual_length": 1},
                "2-5": {"residual_length": 2},
                3: {"residual_length": 3},
                "-1": {"residual_length": 4},
                "last:3": {"residual_length": 5},
            }
        )
        lengths = [config.for_layer(index, 10).residual_length for index in range(10)]
        assert lengths == [1, 1, 2, 3, 2, 2, 32, 5, 5, 4]

    def test_what_an_entry_does_not_say_comes_from_the_configuration(self):
        config = make_config(nbits_k=8, sink_length=2, layers={"0": {"nbits_v": 4, "axis_value": "per_token"}})
        own, other = config.for_layer(0), config.for_layer(1)
        assert (own.key.nbits, own.value.nbits, own.sink_length) == (8, 4, 2)
        assert (own.value.granularity, other.value.granularity) == (Granularity.PER_TOKEN, Granularity.PER_CHANNEL)
        assert (other.key.nbits, other.value.nbits, other.full_precision) == (8, 2, False)

    @pytest.mark.parametrize("index", [0, "0"])
    def test_faults_are_located_however_the_index_is_written(self, index):
        assert refused_paths(layers={index: {"nbits_k": "x"}}) == ["layers['0'].nbits_k"]

    def test_every_field_reaches_its_side(self):
        layer = make_config(
            nbits_k=3,
            nbits_v=2.5,
            axis_key="per_token",
            axis_value="per_channel",
            rotation_k="hadamard",
            rotation_v="none",
            balance_k="none",
            balance_v="rms",
            metadata_dtype="float32",
            compute_dtype="float16",
            device="cpu",
        ).for_layer(7)
        assert (layer.key.nbits, layer.key.granularity, layer.key.rotation) == (3, "per_token", "hadamard")
        assert (layer.value.nbits, layer.value.granularity, layer.value.rotation) == (2.5, "per_channel", "none")
        assert (layer.key.balance, layer.value.balance) == ("none", "rms")
        assert (layer.key.metadata_dtype, layer.compute_dtype) == (torch.float32, torch.float16)
        assert layer.device == torch.device("cpu")

    @pytest.mark.parametrize(
        "layers", [{"0-3": {}, "2-5": {}}, {"first:2": {}, "first:9": {}}, {"last:2": {}, "last:9": {}}]
    )
    def test_overlaps_that_need_no_model_are_refused_at_once(self, layers):
        assert "both choose layer" in refusal(layers=layers)

    def test_neighbours_do_not_overlap(self):
        config = make_config(layers={"0-3": {"nbits_k": 8}, "4-5": {"nbits_k": 5}})
        assert [config.for_layer(index).key.nbits for index in (3, 4)] == [8, 5]

    @pytest.mark.parametrize(("layers", "num_layers"), [({"-1": {}, "7": {}}, 8), ({"first:5": {}, "last:4": {}}, 8)])
    def test_overlaps_that_depend_on_the_model_are_refused_with_it(self, layers, num_layers):
        config = make_config(layers=layers)
        chosen = 7 if "7" in layers else 4
        with pytest.raises(ConfigError, match=f"both choose layer {chosen}; keep one"):
            config.for_layer(chosen, num_layers)
        config.for_layer(chosen, num_layers + 1)

    def test_counting_from_the_end_needs_the_number_of_layers(self):
        config = make_config(layers={"last:2": {"nbits_k": 8}})
        assert config.needs_layer_count
        assert not make_config(layers={"0": {}, "first:3": {}}).needs_layer_count
        with pytest.raises(ConfigError, match=r"'last:2' counts .* needs the number of layers; pass `model=`"):
            config.for_layer(0)

    @pytest.mark.parametrize("selector", ["8", "8-9", "-9"])
    def test_an_entry_that_chooses_no_layer_of_the_model_is_refused(self, selector):
        config = make_config(layers={selector: {"nbits_k": 8}})
        with pytest.raises(ConfigError, match="chooses no layer of a model with 8 layers"):
            config.for_layer(0, 8)
        assert config.for_layer(0, 10).key.nbits == 4

    @pytest.mark.parametrize(
        "selector", ["", "x", "1-", "3-1", "first:0", "last:-1", "0.5", "01", "-0", " 1", "1\n", "٣", True, None, 0.0]
    )
    def test_what_chooses_no_layers_is_refused(self, selector):
        assert repr(selector) in refusal(layers={selector: {}})

    def test_a_layer_named_twice_is_refused(self):
        assert refusal(layers={0: {}, "0": {}}) == (
            "layers: '0' is given twice, as a number and as a string; keep one of them"
        )

    def test_a_layer_is_checked_with_what_it_inherits(self, testing_backend):
        few = dataclasses.replace(
            testing_backend,
            name="testing-few",
            capabilities=Capabilities(nbits=(2,), granularities=(Granularity.PER_TOKEN,)),
        )
        register_backend(few, replace=True)
        paths = refused_paths(layers={"0": {"backend": "testing-few"}})
        assert paths == ["layers['0'].nbits_k", "layers['0'].axis_key", "layers['0'].axis_value"]
        fitting = {"backend": "testing-few", "nbits_k": 2, "axis_key": "per_token", "axis_value": "per_token"}
        assert make_config(layers={"0": fitting}).for_layer(0).key.backend is few

    def test_an_inherited_group_size_must_fit_the_layers_axis(self):
        wide = {"axis_key": "per_token", "axis_value": "per_token", "q_group_size": 12}
        assert refused_paths(**wide, layers={"0": {"axis_key": "per_channel"}}) == ["layers['0'].q_group_size"]
        one_side = {"axis_value": "per_token", "layers": {"0": {"q_group_size": 12}}}
        assert refused_paths(**one_side) == ["layers['0'].q_group_size"]

    def test_an_integer_axis_of_a_layer_is_read_by_the_layers_backend(self, testing_backend, monkeypatch):
        monkeypatch.setattr(limits, "_warned_axes", {("testing-flipped", 0)})
        spec = dataclasses.replace(testing_backend, name="testing-flipped", axis_names={0: Granularity.PER_CHANNEL})
        register_backend(spec, replace=True)
        config = make_config(layers={0: LayerConfig(axis_value=0), 1: LayerConfig(axis_value=0, backend=spec)})
        words = [config.for_layer(index).value.granularity for index in (0, 1)]
        assert words == [Granularity.PER_TOKEN, Granularity.PER_CHANNEL]

    def test_full_precision_stands_alone(self):
        assert make_config(layers={0: {"full_precision": True}}).for_layer(0).full_precision is True
        assert refusal(layers={0: {"full_precision": True, "nbits_k": 4}}).startswith(
            "layers['0']: full_precision=True quantizes nothing, so nbits_k would have no effect"
        )
        assert refusal(layers={0: {"full_precision": 1}}) == (
            "layers['0'].full_precision: 1 is not accepted: true or false"
        )

    @pytest.mark.parametrize(("layers", "path"), [([1], "layers"), ({"0": 4}, "layers['0']")])
    def test_what_is_no_mapping_is_refused(self, layers, path):
        assert refusal(layers=layers).startswith(f"{path}: ")


class TestFewerBitsForKeys:
    def test_it_warns_at_the_callers_line(self):
        with pytest.warns(UserWarning, match="^nbits_k=2 is below nbits_v=4") as caught:
            make_config(nbits_k=2, nbits_v=4)
        assert [warning.filename for warning in caught] == [__file__]

    def test_it_warns_of_the_layers_that_say_so(self):
        with pytest.warns(UserWarning, match=r"^layers\['3'\].nbits_k=4 is below") as caught:
            KVQCacheConfig.from_mapping({"backend": "testing", "layers": {"3": {"nbits_v": 8}, "4": {"nbits_k": 8}}})
        assert [warning.filename for warning in caught] == [__file__]

    def test_many_places_are_one_warning(self):
        with pytest.warns(UserWarning, match=r"^layers\['1'\].nbits_k=2 is below .* \(3 such places\): keys") as caught:
            make_config(nbits_k=4, nbits_v=4, layers={index: {"nbits_k": 2} for index in (1, 3, 5)})
        assert len(caught) == 1

    def test_otherwise_nothing_warns(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_config(nbits_k=4, nbits_v=4, layers={"0": {"full_precision": True}})


class TestFrozen:
    @pytest.fixture
    def config(self):
        return make_config(layers={"0": {"nbits_k": 8}}, backend_options={"testing": {"rounds": 2}})

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: setattr(config, "nbits_k", 8),
            lambda config: setattr(config.layers["0"], "nbits_k", 9),
            lambda config: config.layers.update({"1": LayerConfig()}),
            lambda config: config.layers.pop("0"),
            lambda config: config.backend_options["testing"].__setitem__("rounds", 0),
        ],
    )
    def test_nothing_in_it_can_be_changed(self, config, change):
        before = config.to_dict()
        with pytest.raises((TypeError, ValidationError)):
            change(config)
        assert config.to_dict() == before

    def test_it_is_equal_by_value_and_has_no_hash(self, config):
        same = make_config(layers={0: LayerConfig(nbits_k=8.0)}, backend_options={"testing": {"rounds": 2}})
        assert config == same
        assert config is not same
        assert config != config.replace(sink_length=5)
        assert config != config.replace(layers={})
        for value in (config, config.layers["0"]):
            with pytest.raises(TypeError, match=f"unhashable type: '{type(value).__name__}'"):
                hash(value)

    @pytest.mark.parametrize("copy_config", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])  # noqa: S301
    def test_it_survives_being_copied(self, config, copy_config):
        copied = copy_config(config)
        assert copied == config
        with pytest.raises(TypeError):
            copied.layers["1"] = LayerConfig()

    def test_copies_share_backends_given_as_objects(self, testing_backend):
        spec = dataclasses.replace(testing_backend, name="testing-object")
        config = make_config(backend=spec)
        assert copy.deepcopy(config).backend is spec
        assert copy.deepcopy(config.for_layer(0)).key.backend is spec

    def test_replace_checks_anew(self, config):
        changed = config.replace(nbits_v=4, layers={})
        assert (changed.nbits_v, changed.layers, config.nbits_v) == (4, {}, 2)
        with pytest.raises(ConfigError, match="nbits_v: 9 is not supported"):
            config.replace(nbits_v=9)
        with pytest.raises(ConfigError, match="bits: is unknown"):
            config.replace(bits=9)


@pytest.mark.parametrize("model", [KVQCacheConfig, LayerConfig])
def test_every_field_is_described_and_the_schema_can_be_written(model):
    assert [name for name, field in model.model_fields.items() if not field.description] == []
    assert set(model.model_json_schema()["properties"]) - {"preset"} == set(model.model_fields)


def test_layer_fields_are_those_of_the_cache():
    assert set(LayerConfig.model_fields) - set(KVQCacheConfig.model_fields) == {"full_precision"}


def test_config_errors_are_caught_as_either():
    for expected in (KVQError, ValueError):
        with pytest.raises(expected):
            make_config(sink_length=-1)
    with pytest.raises(BackendError):
        make_config(backend="absent")
