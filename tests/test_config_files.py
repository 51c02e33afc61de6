"""The configuration in files: what survives being written and read, and what a file must not do."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from kvq.config import KeyValue, KVQCacheConfig, LayerConfig
from kvq.errors import BackendError, ConfigError, UnknownBackendError
from kvq.registry import register_backend

pytestmark = pytest.mark.usefixtures("testing_backend")

RICH_FIELDS = {
    "backend": {"key": "testing", "value": "testing-other"},
    "nbits_k": 8.0,
    "nbits_v": 2.5,
    "axis_key": -1,
    "q_group_size": {"key": 64, "value": 32},
    "residual_length": 0,
    "rotation_k": "hadamard",
    "compute_dtype": "torch.bfloat16",
    "metadata_dtype": "float32",
    "device": "cuda:1",
    "sliding": "quantize",
    "layers": {
        0: {"full_precision": True},
        "2-3": {"backend": "testing", "axis_value": 0, "q_group_size": KeyValue(key=16, value=8)},
        "-1": LayerConfig(compute_dtype="float16", nbits_v=3.0),
        "last:2": {"sink_length": 0},
    },
    "backend_options": {"testing": {"rounds": 3, "thresholds": [0.5, 1]}},
}


@pytest.fixture
def rich_config(testing_backend):
    register_backend(dataclasses.replace(testing_backend, name="testing-other"), replace=True)
    return KVQCacheConfig(**RICH_FIELDS)


@pytest.fixture
def write(tmp_path):
    def write_text(text: str, name: str = "kvq.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def file_refusal(path) -> str:
    with pytest.raises(ConfigError) as caught:
        KVQCacheConfig.from_file(path)
    assert caught.value.source == str(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    def test_through_a_mapping(self, rich_config):
        assert KVQCacheConfig.from_mapping(rich_config.to_dict()) == rich_config

    def test_through_a_yaml_file(self, rich_config, write):
        read = KVQCacheConfig.from_file(write(rich_config.to_yaml()))
        assert read == rich_config
        assert read.to_yaml() == rich_config.to_yaml()

    def test_through_a_json_file(self, rich_config, write):
        path = write(json.dumps(rich_config.to_dict()), "kvq.JSON")
        assert KVQCacheConfig.from_file(path) == rich_config

    def test_layers_resolve_alike_on_both_sides_of_it(self, rich_config, write):
        read = KVQCacheConfig.from_file(write(rich_config.to_yaml()))
        for layer_idx in range(6):
            assert read.for_layer(layer_idx, 6) == rich_config.for_layer(layer_idx, 6)

    def test_a_backend_given_as_an_object_becomes_its_name(self, testing_backend):
        values = KVQCacheConfig(backend=testing_backend).to_dict()
        assert values["backend"] == "testing"
        assert KVQCacheConfig.from_mapping(values) == KVQCacheConfig(backend=testing_backend)

    def test_an_object_without_a_registered_name_cannot_be_written(self, testing_backend):
        spec = dataclasses.replace(testing_backend, name="testing-unregistered")
        config = KVQCacheConfig(backend="testing", layers={"0": {"backend": spec}})
        with pytest.raises(ConfigError, match=r"layers\['0'\].backend: 'testing-unregistered' was given as an object"):
            config.to_yaml()

    def test_an_object_that_another_one_has_the_name_of_cannot_be_written(self, testing_backend):
        impostor = dataclasses.replace(testing_backend, summary="another one")
        with pytest.raises(ConfigError, match="call register_backend"):
            KVQCacheConfig(backend=impostor).to_dict()


class TestToDict:
    def test_it_holds_plain_values_only(self, rich_config):
        values = rich_config.to_dict()
        assert values == json.loads(json.dumps(values)) == yaml.safe_load(rich_config.to_yaml())

    def test_it_holds_every_field_and_words_for_axes(self, rich_config):
        values = rich_config.to_dict()
        assert list(values) == list(KVQCacheConfig.model_fields)
        assert (values["axis_key"], values["compute_dtype"], values["device"]) == ("per_channel", "bfloat16", "cuda:1")
        assert values["nbits_k"] == 8
        assert type(values["nbits_k"]) is int

    def test_an_entry_of_layers_holds_what_it_says_only(self, rich_config):
        assert rich_config.to_dict()["layers"] == {
            "0": {"full_precision": True},
            "2-3": {"backend": "testing", "axis_value": "per_token", "q_group_size": {"key": 16, "value": 8}},
            "-1": {"nbits_v": 3, "compute_dtype": "float16"},
            "last:2": {"sink_length": 0},
        }

    def test_changing_it_does_not_change_the_configuration(self, rich_config):
        values = rich_config.to_dict()
        values["layers"]["0"]["full_precision"] = False
        values["backend_options"]["testing"]["thresholds"].append(2)
        assert rich_config == KVQCacheConfig(**RICH_FIELDS)


class TestReading:
    def test_an_empty_file_holds_the_defaults(self, write, monkeypatch, testing_backend):
        registry = type("Registry", (), {"get_backend": staticmethod(lambda _name: testing_backend)})
        monkeypatch.setattr("kvq.config.backend_choice.get_registry", lambda: registry)
        for path in (write(""), write("# nothing\n"), write("", "kvq.json"), write("{}", "kvq.json")):
            assert KVQCacheConfig.from_file(path) == KVQCacheConfig()

    def test_keys_of_layers_may_be_numbers(self, write):
        path = write("backend: testing\nlayers:\n  0: {nbits_k: 8}\n  -1: {nbits_k: 3}\n  first:2: {nbits_k: 6}\n")
        config = KVQCacheConfig.from_file(path)
        assert [config.for_layer(index, 4).key.nbits for index in range(4)] == [8, 6, 4, 3]

    def test_anchors_and_merge_keys_work(self, write):
        text = (
            "backend: testing\n"
            "layers:\n"
            "  '0': &first {nbits_k: 8, nbits_v: 4}\n"
            "  '1': &second {<<: *first, nbits_v: 3}\n"
            "  '2': {<<: *second, nbits_k: 6}\n"
            "  '3': *first\n"
        )
        layers = KVQCacheConfig.from_file(write(text)).layers
        assert [(layer.nbits_k, layer.nbits_v) for layer in layers.values()] == [(8, 4), (8, 3), (6, 3), (8, 4)]

    def test_a_byte_order_mark_is_no_part_of_the_first_key(self, write):
        for name, text in (("kvq.yaml", "\ufeffbackend: testing"), ("kvq.json", '\ufeff{"backend": "testing"}')):
            assert KVQCacheConfig.from_file(write(text, name)).backend == "testing"


class TestRefusals:
    def test_a_fault_names_the_file_and_the_path(self, write):
        path = write("backend: testing\nlayers:\n  0: {nbits_k: 9}\n")
        assert file_refusal(path) == (
            "layers['0'].nbits_k: 9 is not supported by backend 'testing'; "
            f"choose one of 1, 2, 2.5, 3, 4, 5, 6, 7, 8 (from {path})"
        )

    def test_several_faults_name_the_file_once(self, write):
        path = write("backend: testing\nsink_length: -1\ndevice: gpu\n")
        message = file_refusal(path)
        assert message.startswith(f"2 faults in {path}:\n  - sink_length: -1 is not")
        assert message.count(str(path)) == 1

    def test_a_missing_backend_names_the_file_and_stays_what_it_is(self, write):
        path = write("backend: testing\nlayers: {0: {backend: absent}}\n")
        with pytest.raises(UnknownBackendError) as caught:
            KVQCacheConfig.from_file(path)
        assert str(caught.value).endswith(f"(from {path}: layers['0'].backend)")
        assert isinstance(caught.value, BackendError)

    @pytest.mark.parametrize("place", ["{}", "backend: {}", "backend: testing\nlayers: {{0: {}}}", "{}: testing"])
    def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(self, write, tmp_path, place):
        made = tmp_path / "made"
        text = place.format(f"!!python/object/apply:os.mkdir ['{made}']")
        if not place.startswith("{}: "):
            yaml.unsafe_load(text)
            assert made.exists()  # it does run where nothing prevents it
            made.rmdir()
        message = file_refusal(write(text))
        assert "the file cannot be parsed: " in message
        assert not made.exists()

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("kvq.yaml", "nbits_k: 4\nbackend: testing\nnbits_k: 8\n"),
            ("kvq.yaml", "backend: testing\nlayers:\n  0: {nbits_k: 4, nbits_k: 8}\n"),
            ("kvq.yaml", "backend: testing\nlayers:\n  0: {nbits_k: 4}\n  0: {nbits_k: 8}\n"),
            ("kvq.json", '{"backend": "testing", "nbits_k": 4, "nbits_k": 8}'),
            ("kvq.json", '{"layers": {"0": {"nbits_k": 4, "nbits_k": 8}}}'),
        ],
    )
    def test_a_key_given_twice_is_refused(self, write, name, text):
        key = "0" if "}\n  0:" in text else "'nbits_k'"
        assert f"the key {key} is given twice" in file_refusal(write(text, name))

    @pytest.mark.parametrize(
        ("name", "text", "location"),
        [
            ("kvq.yaml", "nbits_k: .nan", "nbits_k: nan"),
            ("kvq.yaml", "residual_length: .inf", "residual_length: inf"),
            ("kvq.yaml", "layers: {0: {nbits_v: -.inf}}", "layers['0'].nbits_v: -inf"),
            ("kvq.yaml", "backend_options: {testing: {thresholds: [1, .inf]}}", "testing.thresholds[1]: inf"),
            ("kvq.json", '"nbits_k": NaN', "nbits_k: nan"),
            ("kvq.json", '"backend_options": {"testing": {"thresholds": [Infinity]}}', "testing.thresholds[0]: inf"),
        ],
    )
    def test_numbers_that_are_not_finite_are_refused_with_their_path(self, write, name, text, location):
        text = f'{{"backend": "testing", {text}}}' if name.endswith("json") else f"backend: testing\n{text}\n"
        message = file_refusal(write(text, name))
        assert f"{location} is not accepted" in message

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("kvq.yaml", "backend: [testing"),
            ("kvq.yaml", "a: b: c"),
            ("kvq.yaml", "--- {}\n--- {}\n"),
            ("kvq.yaml", "{[1]: 2}"),
            ("kvq.yaml", "when: 2025-02-31"),
            ("kvq.yaml", "[" * 2_000),
            ("kvq.json", "backend: testing"),
            ("kvq.json", "[" * 200_000),
        ],
    )
    def test_what_cannot_be_parsed_is_told_in_one_line(self, write, name, text):
        message = file_refusal(write(text, name))
        assert "the file cannot be parsed: " in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("name", "text", "kind"),
        [("kvq.yaml", "testing", "str"), ("kvq.yaml", "- 1", "list"), ("kvq.json", "4", "int")],
    )
    def test_what_is_no_mapping_is_refused(self, write, name, text, kind):
        assert f"the file holds a {kind}; a mapping of fields is needed" in file_refusal(write(text, name))

    def test_keys_must_be_names(self, write):
        assert "the keys must be names of fields, got [4, True]" in file_refusal(write("4: testing\non: testing\n"))

    def test_what_cannot_be_read_is_refused(self, tmp_path):
        assert "No such file" in file_refusal(tmp_path / "absent.yaml")
        assert "the file cannot be read" in file_refusal(tmp_path)
        binary = tmp_path / "binary.yaml"
        binary.write_bytes(b"\xff\xfe\x00backend")
        assert "the file cannot be read" in file_refusal(binary)

    def test_the_mapping_itself_may_be_wrong(self):
        with pytest.raises(ConfigError, match="a mapping of fields is needed, got list"):
            KVQCacheConfig.from_mapping(["backend"])
