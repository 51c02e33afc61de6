"""A calibration in a configuration: written, read back, given to the backend that asks, refused elsewhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from small_llama import build_model
from transformers import T5Config

from kvq import KVQ, Calibration, EncoderDecoderKVQ, KVQCacheConfig, attach
from kvq.cli.config_summary import summarize_mapping
from kvq.errors import CalibrationError, ConfigError, ContractViolationError
from kvq.plugin_api import LayerStatistics
from kvq.registry import get_registry
from kvq.testing import list_cases
from kvq.testing.statistics import check_calibration


@pytest.fixture
def path(calibration, tmp_path):
    calibration.save(tmp_path / "own.calibration")
    return tmp_path / "own.calibration"


def fill(cache, tokens=150):
    states = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(0))
    for layer_idx in range(2):
        cache.update(states, states, layer_idx)
    return cache


class TestFile:
    def test_what_is_read_is_what_was_written(self, calibration, path):
        found = Calibration.load(path)
        assert found == calibration
        assert (found.digest, found.text, found.tokens, found.layers) == (calibration.digest, "drawn", 168, [0, 1])
        for side in ("key", "value"):
            own, other = found.get(1, side, 2, 32), calibration.get(1, side, 2, 32)
            for name, tensor in vars(other).items():
                assert tensor is getattr(own, name) is None or torch.equal(tensor, getattr(own, name))

    def test_another_text_is_another_calibration(self, calibration, model, sequences):
        from kvq import calibrate

        other = calibrate(model, sequences[:2])
        assert other != calibration
        assert other.digest != calibration.digest

    @pytest.mark.parametrize("place", [40, 3000, -5])
    def test_a_damaged_file_is_refused(self, path, place):
        damaged = bytearray(path.read_bytes())
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"own.calibration' cannot be read"):
            Calibration.load(path)

    def test_a_saved_cache_is_no_calibration(self, tmp_path):
        fill(KVQ(backend="native")).save(tmp_path / "cache.kvq")
        with pytest.raises(CalibrationError, match="something else than a calibration of kvq"):
            Calibration.load(tmp_path / "cache.kvq")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"mean": torch.zeros(2, 16)}, "second_moment is"),
            ({"minimum": torch.zeros(3, 32)}, "minimum is"),
            ({"maximum": torch.full((2, 32), torch.nan)}, "not finite"),
        ],
    )
    def test_tensors_that_do_not_belong_together_are_refused(self, calibration, tmp_path, change, told):
        own = dataclasses.replace(calibration.get(0, "key", 2, 32), **change)
        Calibration({(0, "key"): own}).save(tmp_path / "wrong")
        with pytest.raises(CalibrationError, match=told):
            Calibration.load(tmp_path / "wrong")

    def test_a_path_that_cannot_be_written_is_told(self, calibration, tmp_path):
        with pytest.raises(CalibrationError, match="cannot be written: No such file"):
            calibration.save(tmp_path / "missing" / "file")


class TestConfiguration:
    def test_path_object_and_written_form_mean_the_same(self, asking, calibration, path, tmp_path):
        asking("optional")
        config = KVQCacheConfig(backend="asking", calibration=path)
        assert config == KVQCacheConfig(backend="asking", calibration=str(path))
        assert config == KVQCacheConfig(backend="asking", calibration=calibration)
        assert config.to_dict()["calibration"] == {"file": str(path), "digest": calibration.digest}
        (tmp_path / "k.yaml").write_text(config.to_yaml())
        (tmp_path / "k.json").write_text(json.dumps(config.to_dict()))
        assert config == KVQCacheConfig.from_file(tmp_path / "k.yaml") == KVQCacheConfig.from_file(tmp_path / "k.json")

    def test_a_relative_path_leads_from_the_folder_of_the_configuration(self, asking, path):
        asking("required")
        (path.parent / "k.yaml").write_text("backend: asking\ncalibration: own.calibration\n")
        assert KVQCacheConfig.from_file(path.parent / "k.yaml").calibration.path == path

    def test_the_command_checks_it_with_a_head_of_its_own(self, asking, path):
        """It knows no model, and finds the file beside the configuration."""
        asking("required")
        fields = {"backend": "asking", "calibration": "own.calibration"}
        summary = summarize_mapping(fields, str(path.parent / "k.yaml"), head_dim=48)
        assert [side.effective_bits is not None for side in summary.sides] == [True, True]

    def test_a_file_that_was_written_again_is_read_again(self, asking, model, sequences, path):
        from kvq import calibrate

        asking("optional")
        first = KVQCacheConfig(backend="asking", calibration=path)
        written = first.to_dict()
        calibrate(model, sequences[:1]).save(path)
        assert KVQCacheConfig(backend="asking", calibration=path) != first
        with pytest.raises(ConfigError, match=r"calibration: .* has the digest"):
            KVQCacheConfig.from_mapping(written)

    @pytest.mark.parametrize("value", [3, "", {"file": "x"}, ["x"]])
    def test_other_values_are_refused(self, value):
        with pytest.raises(ConfigError, match="is not accepted: the path of a file that `kvq calibrate` wrote"):
            KVQCacheConfig(calibration=value)

    def test_a_missing_file_is_one_fault(self, asking, tmp_path):
        asking("optional")
        with pytest.raises(ConfigError, match=r"^calibration: .*nowhere' cannot be read: No such file") as caught:
            KVQCacheConfig(backend="asking", calibration=tmp_path / "nowhere")
        assert len(caught.value.faults) == 1

    def test_a_backend_that_needs_one_is_refused_without(self, asking):
        asking("required")
        for fields in ({"backend": "asking"}, {"backend": "native", "layers": {1: {"backend": "asking"}}}):
            with pytest.raises(ConfigError, match=r"backend 'asking' needs statistics of the model.*kvq calibrate"):
                KVQCacheConfig(**fields)
            KVQCacheConfig(**fields, calibration="standard")

    def test_one_without_effect_is_told(self, asking, path):
        asking("unused")
        with pytest.warns(UserWarning, match="calibration: .* has no effect: backend 'asking'"):
            KVQCacheConfig(backend="asking", calibration=path)

    def test_one_that_is_in_no_file_cannot_be_written_out(self, asking, calibration):
        asking("optional")
        with pytest.raises(ConfigError, match="save it first"):
            KVQCacheConfig(backend="asking", calibration=calibration).to_yaml()


class TestBackend:
    @pytest.mark.parametrize("word", ["optional", "required"])
    def test_it_gets_those_of_its_side_and_layer(self, asking, calibration, word):
        seen = asking(word)
        fill(KVQ(backend="asking", calibration=calibration))
        assert len(seen) == 4
        for spec in seen:
            assert spec.statistics is calibration.get(spec.layer_idx, spec.side, 2, 32)

    def test_it_gets_none_unasked_or_ungiven(self, asking, calibration):
        seen = asking("unused")
        with pytest.warns(UserWarning, match="no effect"):
            fill(KVQ(backend="asking", calibration=calibration))
        asking("optional")
        fill(KVQ(backend="asking"))
        assert [spec.statistics for spec in seen] == [None] * 8

    def test_standard_knows_nothing(self, asking):
        seen = asking("required")
        fill(KVQ(backend="asking", calibration="standard"))
        own = seen[0].statistics
        assert isinstance(own, LayerStatistics)
        assert torch.equal(own.second_moment, torch.eye(32).expand(2, 32, 32))
        assert not own.mean.any()

    def test_states_of_another_shape_are_refused(self, asking, calibration):
        asking("optional")
        states = torch.randn(1, 4, 150, 32)
        with pytest.raises(CalibrationError, match=r"2 x 32 numbers .* in layer 0, and these states have 4 x 32"):
            KVQ(backend="asking", calibration=calibration).update(states, states, 0)
        with pytest.raises(CalibrationError, match="no keys of layer 5, but layers 0 to 1"):
            calibration.get(5, "key", 2, 32)


class TestModel:
    def test_generating_reads_it(self, asking, model, path, sequences):
        seen = asking("required")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with attach(model, backend="asking", calibration=path, residual_length=0, sink_length=4) as attachment:
                model.generate(sequences[:1].repeat(1, 3), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert attachment.cache.get_seq_length() > 180
        assert {(spec.layer_idx, spec.side) for spec in seen if spec.statistics is not None} == {
            (layer_idx, side) for layer_idx in range(2) for side in ("key", "value")
        }

    @pytest.mark.parametrize(
        ("other", "told"),
        [({"seed": 4}, r"the weights of .*k_proj.* differ"), ({"num_key_value_heads": 3}, "num_key_value_heads is 2")],
    )
    def test_another_model_is_refused(self, asking, path, other, told):
        asking("optional")
        for call in (KVQ, attach):
            with pytest.raises(ConfigError, match=f"of another model: {told}.*; run `kvq calibrate` on this one"):
                call(model=build_model(**other), backend="asking", calibration=path)

    def test_a_model_with_an_encoder_is_another_one(self, asking, path):
        asking("optional")
        sizes = dict(vocab_size=97, d_model=32, d_kv=32, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        with pytest.raises(ConfigError, match="of another model: "):
            EncoderDecoderKVQ(backend="asking", calibration=path, model=T5Config(**sizes))
        EncoderDecoderKVQ(backend="asking", calibration="standard", model=T5Config(**sizes))

    def test_a_configuration_of_the_model_is_compared_as_far_as_it_goes(self, asking, path, model):
        asking("optional")
        KVQ(backend="asking", calibration=path, model=model.config)
        with pytest.raises(ConfigError, match="hidden_size is 48 there and 96 here"):
            KVQ(backend="asking", calibration=path, model=build_model(hidden_size=96).config)


class TestSavedCache:
    def test_it_has_the_digest_and_finds_the_file_again(self, asking, calibration, path, tmp_path):
        asking("required")
        cache = fill(KVQ(backend="asking", calibration=path))
        cache.save(tmp_path / "cache.kvq")
        assert calibration.digest.encode() in (tmp_path / "cache.kvq").read_bytes()
        loaded = KVQ.load(tmp_path / "cache.kvq")
        assert loaded.config == cache.config
        for layer_idx in range(2):
            for own, other in zip(loaded.materialize(layer_idx), cache.materialize(layer_idx), strict=True):
                assert torch.equal(own, other)

    def test_a_file_that_moved_is_named_at_loading(self, asking, path, tmp_path):
        asking("required")
        fill(KVQ(backend="asking", calibration=path)).save(tmp_path / "cache.kvq")
        moved = tmp_path / "elsewhere"
        shutil.move(path, moved)
        with pytest.raises(ConfigError, match=r"calibration: .*cannot be read: No such file.*\(from .*cache.kvq\)"):
            KVQ.load(tmp_path / "cache.kvq")
        assert KVQ.load(tmp_path / "cache.kvq", calibration=moved).get_seq_length() == 150
        assert KVQ.load(tmp_path / "cache.kvq", calibration=Calibration.load(moved)).get_seq_length() == 150

    def test_another_one_is_refused(self, asking, path, model, sequences, tmp_path):
        from kvq import calibrate

        asking("required")
        fill(KVQ(backend="asking", calibration=path)).save(tmp_path / "cache.kvq")
        with pytest.raises(ConfigError, match="another one"):
            KVQ.load(tmp_path / "cache.kvq", calibration=calibrate(model, sequences[:1]))

    def test_one_for_a_cache_that_had_none_is_refused(self, calibration, tmp_path):
        fill(KVQ(backend="native")).save(tmp_path / "cache.kvq")
        with pytest.raises(ConfigError, match="has none; leave it out"):
            KVQ.load(tmp_path / "cache.kvq", calibration=calibration)


class TestContract:
    def check(self, name):
        check_calibration(list_cases(get_registry().get_backend(name))[0])

    def test_one_that_takes_any_passes(self, asking):
        asking("optional")
        self.check("asking")

    def test_one_that_writes_to_them_fails(self, testing_backend):
        from kvq import register_backend

        def build(spec, options):
            spec.statistics.maximum.zero_()
            return testing_backend.build(spec, options)

        register_backend(
            dataclasses.replace(testing_backend, name="writing", build=build, calibration="required"), replace=True
        )
        with pytest.raises(ContractViolationError, match="maximum of the keys' statistics was written to"):
            self.check("writing")
