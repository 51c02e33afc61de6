"""Keys rounded for the queries of a calibration: in configurations, models, files, plans, and where it is refused."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from reference_quantizers import NORM_CODEBOOK
from small_llama import build_model
from test_collecting import collect_states

from kvq import KVQ, Calibration, KVQCacheConfig, attach, calibrate, register_backend
from kvq.cli.config_summary import summarize_mapping
from kvq.errors import CalibrationError, ConfigError
from kvq.planning import plan
from kvq.tuning.side_setting import Pair, SideSetting, build_config

FIELDS = {"backend": "native", "rounding_k": "error_feedback", "residual_length": 0, "sink_length": 0}


@pytest.fixture
def path(calibration, tmp_path):
    calibration.save(tmp_path / "own.calibration")
    return tmp_path / "own.calibration"


def fill(cache, tokens=150, seed=0):
    states = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))
    for layer_idx in range(2):
        cache.update(states, states, layer_idx)
    return cache


def keys_of(cache):
    return [layer.side("key") for layer in cache.layers]


class TestConfiguration:
    def test_it_stands_in_files(self, path, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no word of a calibration without effect
            config = KVQCacheConfig(**FIELDS, calibration=path)
        (tmp_path / "k.yaml").write_text(config.to_yaml())
        assert KVQCacheConfig.from_file(tmp_path / "k.yaml") == config
        assert config.to_dict()["rounding_k"] == "error_feedback"
        (path.parent / "short.yaml").write_text(
            "{backend: native, rounding_k: error_feedback, calibration: own.calibration}"
        )
        assert KVQCacheConfig.from_file(path.parent / "short.yaml").for_layer(0).key.rounding == "error_feedback"

    def test_without_it_codes_are_the_nearest(self):
        layer = KVQCacheConfig(backend="native").for_layer(0)
        assert (layer.key.rounding, layer.value.rounding) == ("nearest", "nearest")

    def test_a_file_with_all_other_fields_gets_nothing_new(self):
        config = KVQCacheConfig(backend="native")
        older = {name: value for name, value in config.to_dict().items() if name != "rounding_k"}
        assert KVQCacheConfig.from_mapping(older) == config

    @pytest.mark.parametrize(
        ("fields", "place"),
        [
            ({"rounding_k": "error_feedback"}, "rounding_k"),
            ({"layers": {"1": {"rounding_k": "error_feedback"}}}, r"layers\['1'\].rounding_k"),
        ],
    )
    def test_without_a_calibration_it_is_refused(self, fields, place):
        with pytest.raises(ConfigError, match=f"{place}='error_feedback' needs .*kvq calibrate --model") as caught:
            KVQCacheConfig(backend="native", **fields)
        assert len(caught.value.faults) == 1
        with pytest.warns(
            UserWarning, match=f"{place}='error_feedback' has no effect: calibration 'standard' knows no"
        ):
            KVQCacheConfig(backend="native", calibration="standard", **fields)

    @pytest.mark.parametrize("value", ["auto", "none", True, None])
    def test_other_words_are_refused(self, value):
        with pytest.raises(ConfigError, match="rounding_k"):
            KVQCacheConfig(backend="native", rounding_k=value)

    def test_layers_choose_for_themselves(self, calibration):
        for fields, expected in (
            ({"rounding_k": "nearest", "layers": {1: {"rounding_k": "error_feedback"}}}, [False, True]),
            ({"layers": {1: {"rounding_k": "nearest"}}}, [True, False]),
        ):
            cache = fill(KVQ(**{**FIELDS, **fields}, calibration=calibration))
            codecs = [dict(layer.sides())["key"].codec for layer in cache.layers]
            assert [codec.feedback is not None for codec in codecs] == expected
            assert all(layer.side("value").codec.feedback is None for layer in cache.layers)

    def test_candidates_of_tuning_keep_it(self, calibration):
        base = KVQCacheConfig(**FIELDS, calibration=calibration)
        pair = Pair(SideSetting("native", 2), SideSetting("quanto", 4))
        layer = build_config(base, {1: pair}, 3).for_layer(1, 3)
        assert (layer.key.rounding, layer.value.rounding, layer.key.nbits) == ("error_feedback", "nearest", 2)

    def test_the_command_checks_it_with_a_head_of_its_own(self, path):
        summary = summarize_mapping({**FIELDS, "calibration": str(path)}, "k.yaml", head_dim=48)
        assert [side.effective_bits is not None for side in summary.sides] == [True, True]


class TestRefusals:
    @pytest.mark.parametrize(
        ("backend", "options"),
        [("quanto", {}), ("hqq", {}), ("native", {"native": {"clip": "mse"}}), ("norm_codebook", {})],
    )
    def test_backends_with_codes_of_their_own(self, backend, options, calibration):
        register_backend(NORM_CODEBOOK, replace=True)
        fields = {**FIELDS, "backend": {"key": backend, "value": "native"}, "backend_options": options}
        with pytest.raises(ConfigError, match=rf"rounding_k: {backend} does not say that it rounds to nearest") as one:
            fill(KVQ(**fields, calibration=calibration))
        assert len(str(one.value).splitlines()) == 1
        assert "keys by a backend that says so, as 'native' without options does" in str(one.value)

    def test_values_of_any_backend_go_with_it(self, calibration):
        fields = {**FIELDS, "backend": {"key": "native", "value": "quanto"}}
        assert fill(KVQ(**fields, calibration=calibration)).get_seq_length() == 150

    def test_statistics_without_queries(self, calibration):
        own = dataclasses.replace(calibration.get(0, "key", 2, 32), query_moment=None)
        with pytest.raises(CalibrationError, match="has no queries of the shape of the keys in layer 0"):
            fill(KVQ(**FIELDS, calibration=Calibration({(0, "key"): own})))

    def test_another_model(self, path):
        with pytest.raises(ConfigError, match="of another model"):
            attach(build_model(seed=4), **FIELDS, calibration=path)


class TestModel:
    def test_scores_of_another_text_are_nearer(self, model, sequences):
        """Queries and keys of text that was not calibrated on, collected without kvq; three heads read each key head.

        Those of a model that was never trained look everywhere alike; here they have few directions, as trained ones.
        """
        generator = torch.Generator().manual_seed(2)
        for layer in model.model.layers:
            directions = torch.randn(2, 1, 32, 3, generator=generator)  # of the heads that share a key head
            heads = layer.self_attn.q_proj.weight.data.unflatten(0, (2, 3, 32))
            heads.copy_(directions @ torch.randn(2, 3, 3, 48, generator=generator))
        calibration = calibrate(model, sequences)
        text = torch.randint(0, 97, (2, 140), generator=torch.Generator().manual_seed(9))
        for layer_idx, (query, keys, _) in collect_states(model, text).items():
            errors = []
            for fields in ({**FIELDS, "calibration": calibration}, {**FIELDS, "rounding_k": "nearest"}):
                cache = KVQ(**fields, nbits_k=2)
                for index in range(2):
                    cache.update(keys, keys, index)
                lost = (cache.materialize(layer_idx)[0] - keys)[:, :, :128]
                scores = torch.einsum("bhgqd,bhtd->bhgqt", query.unflatten(1, (2, 3)), lost)
                errors.append(scores.square().mean())
            assert errors[0] < 0.75 * errors[1]

    def test_generating_and_going_on(self, model, path, sequences):
        prompt = sequences[:1].repeat(1, 3)
        options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
        with attach(model, **FIELDS, calibration=path) as attachment:
            model.generate(prompt, **options)
        key = attachment.cache.layers[0].side("key")
        assert key.codec.feedback is not None
        assert key.store.length >= 192


class TestBytes:
    def test_it_takes_none(self, model, calibration):
        plain = KVQ(**{**FIELDS, "rounding_k": "nearest"})
        chosen = KVQ(**FIELDS, calibration=calibration)
        assert fill(chosen).memory().total_bytes == fill(plain).memory().total_bytes
        plans = [plan(model.config, cache.config, context=1000) for cache in (plain, chosen)]
        assert plans[0].total_bytes == plans[1].total_bytes
        assert [text for text in plans[1].left_out if "error_feedback" in text] == [
            "tables of error_feedback (17.0 KiB)"
        ]
        assert not any("error_feedback" in text for text in plans[0].left_out)
        held = [sum(one.nbytes for one in side.codec.feedback.on(side.device)) for side in keys_of(chosen)]
        assert sum(held) == 17 * 1024
        assert ", error_feedback (" in str(plans[1].layers[0].key)
        assert "error_feedback" not in str(plans[1].layers[0].value) + str(plans[0].layers[0].key)

    def test_a_copy_goes_on_as_the_original(self, calibration):
        cache = fill(KVQ(**FIELDS, calibration=calibration))
        other = copy.deepcopy(cache)
        for one in (cache, other):
            fill(one, 200, seed=1)
        assert torch.equal(other.materialize(1)[0], cache.materialize(1)[0])

    def test_a_saved_cache_goes_on_as_it_would_have(self, path, tmp_path):
        cache = fill(KVQ(**FIELDS, calibration=path))
        cache.save(tmp_path / "cache.kvq")
        loaded = KVQ.load(tmp_path / "cache.kvq")
        assert loaded.config == cache.config
        for one in (cache, loaded):
            fill(one, 200, seed=1)
        for layer_idx in range(2):
            for own, other in zip(loaded.materialize(layer_idx), cache.materialize(layer_idx), strict=True):
                assert torch.equal(own, other)
