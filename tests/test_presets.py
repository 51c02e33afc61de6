"""Presets: what a name stands for, what wins over it, and what is left of it once a configuration is built."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers

from kvq import KVQ, KVQCacheConfig, attach
from kvq.config import PRESETS
from kvq.config import presets as module
from kvq.config.frozen import FrozenDict
from kvq.errors import ConfigError
from kvq.planning import plan

NAMES = ("8bit", "4bit", "3bit", "2bit")
SIZES = dict(hidden_size=128, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=199)


@pytest.fixture
def write(tmp_path):
    def write_text(text, name="kvq.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=2, max_position_embeddings=4096, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def bits_of(config):
    return config.nbits_k, config.nbits_v


class TestNames:
    def test_there_are_four_the_widest_first(self):
        assert tuple(PRESETS) == NAMES

    @pytest.mark.parametrize(("name", "nbits"), [("8bit", 8), ("4bit", 4), ("3bit", 3), ("2bit", 2)])
    def test_one_means_what_its_fields_mean(self, name, nbits):
        assert KVQCacheConfig(preset=name) == KVQCacheConfig(
            backend="native",
            nbits_k=nbits,
            nbits_v=nbits,
            axis_value="per_channel",
            rotation_k="hadamard",
            rotation_v="hadamard",
            balance_k="rms",
            balance_v="rms",
            metadata_dtype="int8" if nbits < 4 else None,
        )

    @pytest.mark.parametrize("name", ["5bit", "", "4BIT", 4, None, ["4bit"], {"name": "4bit"}])
    def test_an_unknown_one_is_refused_with_the_known_ones(self, name):
        message = f"preset: {name!r} is not accepted: a preset is one of '8bit', '4bit', '3bit', '2bit'"
        for build in (KVQCacheConfig, KVQ, KVQCacheConfig().replace):
            with pytest.raises(ConfigError) as caught:
                build(preset=name)
            assert str(caught.value) == message

    def test_an_unknown_one_in_a_file_is_refused_with_the_file(self, write):
        path = write("preset: 6bit\n")
        with pytest.raises(ConfigError, match=r"^preset: '6bit' is not accepted.*kvq\.yaml\)$") as caught:
            KVQ(path)
        assert caught.value.source == str(path)

    def test_a_misspelt_key_is_guessed(self):
        with pytest.raises(ConfigError, match="presets: is unknown; did you mean 'preset'"):
            KVQCacheConfig(presets="4bit")

    def test_the_table_cannot_be_changed(self):
        with pytest.raises(TypeError):
            PRESETS["4bit"] = {}
        with pytest.raises(TypeError):
            PRESETS["4bit"]["nbits_k"] = 2


class TestPrecedence:
    def test_fields_beside_it_win_wherever_they_stand(self):
        for fields in (dict(preset="4bit", nbits_v=3), dict(nbits_v=3, preset="4bit")):
            config = KVQCacheConfig.from_mapping(fields)
            assert (*bits_of(config), config.rotation_v) == (4, 3, "hadamard")

    def test_fields_that_it_does_not_have_are_added(self):
        cache = KVQ(preset="4bit", residual_length=64, layers={"0": {"nbits_k": 8}})
        assert (cache.config.residual_length, cache.config.nbits_v, cache.config.axis_value) == (64, 4, "per_channel")
        assert cache.config.for_layer(0).key.nbits == 8

    def test_a_value_equal_to_the_default_wins_too(self):
        config = KVQCacheConfig(preset="8bit", nbits_v=2, rotation_k="none", backend="quanto")
        assert (config.backend, *bits_of(config), config.rotation_k) == ("quanto", 8, 2, "none")

    def test_keywords_win_over_a_preset_in_a_mapping_or_a_file(self, write):
        for given in ({"preset": "2bit"}, write("preset: 2bit\n"), KVQCacheConfig(preset="2bit")):
            config = KVQ(given, nbits_k=4).config
            assert (*bits_of(config), config.rotation_v) == (4, 2, "hadamard")

    def test_a_preset_among_the_keywords_wins_as_its_fields_would(self, write):
        fields = {"nbits_k": 8, "sink_length": 7, "q_group_size": 32}
        for given in (fields, write(json.dumps(fields), "kvq.json"), KVQCacheConfig(**fields)):
            config = KVQ(given, preset="3bit", nbits_v=2).config
            assert (*bits_of(config), config.sink_length, config.q_group_size) == (3, 2, 7, 64)

    def test_the_later_preset_wins(self):
        for given in ({"preset": "8bit"}, KVQCacheConfig(preset="8bit")):
            assert bits_of(KVQ(given, preset="3bit").config) == (3, 3)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"residual_length": -1}, "residual_length: -1 is not accepted"),
            ({"nbits_k": 9}, "nbits_k: 9 is not supported by backend 'native'"),
            ({"backend": "quanto", "nbits_v": 3}, "nbits_v: 3 is not supported by backend 'quanto'"),
            ({"bits": 4}, "bits: is unknown"),
        ],
    )
    def test_the_users_fields_are_checked_as_always(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            KVQCacheConfig(preset="4bit", **fields)

    def test_another_backend_has_to_offer_its_bits(self):
        with pytest.raises(ConfigError, match="nbits_k: 3 is not supported by backend 'quanto'"):
            KVQCacheConfig(preset="3bit", backend="quanto")

    def test_an_entry_of_layers_takes_none(self):
        with pytest.raises(ConfigError, match=r"layers\['0'\].preset: is unknown"):
            KVQCacheConfig(layers={"0": {"preset": "4bit"}})


class TestWhereOneIsRead:
    @pytest.mark.parametrize("name", ["kvq.yaml", "kvq.json"])
    def test_a_file(self, write, name):
        path = write('{"preset": "3bit", "sink_length": 0}', name)
        assert KVQCacheConfig.from_file(path) == KVQCacheConfig(preset="3bit", sink_length=0)

    def test_yaml_without_quotes(self, write):
        assert KVQ(write("preset: 8bit\n")).config == KVQCacheConfig(preset="8bit")

    def test_attach(self, model):
        with attach(model, preset="4bit", residual_length=0, sink_length=0) as attachment:
            model.generate(torch.arange(1, 150)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
            side = attachment.cache.layers[1].side("value")
            assert side.store.length >= 64
            assert attachment.cache.config == KVQCacheConfig(preset="4bit", residual_length=0, sink_length=0)

    def test_a_plan(self, model):
        made = plan(model.config, {"preset": "3bit"}, context=1000, dtype=torch.bfloat16)
        key = made.layers[0].key
        assert (key.backend, key.nbits, key.rotation, made.layers[0].value.nbits) == ("native", 3, "hadamard", 3)

    def test_the_schema_proposes_the_names_and_allows_others_fields_beside_one(self):
        schema = KVQCacheConfig.model_json_schema()
        assert schema["properties"]["preset"]["enum"] == list(NAMES)
        assert "required" not in schema
        assert next(iter(schema["properties"])) == "preset"

    @pytest.mark.parametrize(
        ("fields", "step"),
        [
            ({"axis_value": "per_token"}, "balance_v"),
            ({"backend": "quanto", "axis_key": 0, "axis_value": 0}, "balance_k"),
            ({"layers": {0: {"axis_value": "per_token"}}}, "balance_v"),
            ({"backend": "quanto"}, "rotation_v"),
        ],
    )
    def test_what_might_not_go_with_a_field_beside_it_is_auto(self, fields, step):
        assert getattr(KVQCacheConfig(preset="4bit", **fields), step) == "auto"
        assert getattr(KVQCacheConfig(preset="4bit", **fields, **{step: "none"}), step) == "none"

    def test_groups_inside_a_token_and_layers_keep_no_metadata_in_bytes(self):
        """Scales there differ by more than a byte holds, from token to token of a block."""
        assert KVQCacheConfig(preset="2bit", backend="hqq").metadata_dtype is torch.int8
        for fields in (
            {"axis_key": "per_token"},
            {"axis_value": 0, "backend": "quanto"},
            {"layers": {0: {"nbits_k": 4}}},
        ):
            assert KVQCacheConfig(preset="2bit", **fields).metadata_dtype is None
        assert KVQCacheConfig(preset="2bit", axis_key="per_token", metadata_dtype="int8").metadata_dtype is torch.int8


class TestWhatIsLeft:
    def test_what_is_written_holds_the_fields_alone(self):
        config = KVQCacheConfig(preset="2bit")
        values = config.to_dict()
        assert list(values) == list(KVQCacheConfig.model_fields)
        assert {name: values[name] for name in PRESETS["2bit"]} == PRESETS["2bit"]
        assert "preset" not in config.to_yaml()

    def test_a_table_that_changes_later_changes_no_file(self, tmp_path, write, monkeypatch):
        config = KVQCacheConfig(preset="4bit")
        written = write(config.to_yaml())
        cache = KVQ(preset="4bit")
        states = torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(0))
        cache.update(states, states, 0)
        before = cache.layers[0].keys.clone()
        cache.save(tmp_path / "cache.kvq")
        later = FrozenDict({"4bit": FrozenDict(backend="quanto", nbits_k=2, nbits_v=2)})
        monkeypatch.setattr(module, "PRESETS", later)
        assert KVQCacheConfig(preset="4bit").nbits_k == 2
        assert KVQCacheConfig.from_file(written) == config
        loaded = KVQ.load(tmp_path / "cache.kvq")
        assert loaded.config == config
        assert torch.equal(loaded.layers[0].keys, before)


def read_values(name, states, **fields):
    """Return what a cache gives back for values, all of them quantized."""
    cache = KVQ(preset=name, residual_length=0, sink_length=0, **fields)
    cache.update(states, states, 0)
    return cache.layers[0].values


def round_by_hand(states, nbits, dim=-1):
    """Round the elements along a dimension to the nearest of the levels between their extremes."""
    low, high = states.amin(dim, keepdim=True), states.amax(dim, keepdim=True)
    step = (high - low) / (2**nbits - 1)
    return torch.round((states - low) / step) * step + low


@pytest.mark.parametrize(("name", "nbits"), [("8bit", 8), ("4bit", 4), ("3bit", 3), ("2bit", 2)])
class TestAccuracy:
    def outliers(self):
        """Return states `[1, 2, 256, 64]` whose channels 3 and 40 are thirty times the others."""
        states = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(1))
        states[..., [3, 40]] *= 30
        return states

    def test_rotation_beats_rounding_of_the_same_bits_where_channels_stand_out(self, name, nbits):
        states = self.outliers()
        by_hand = (round_by_hand(states, nbits) - states).square().mean().item()
        rotated = (read_values(name, states) - states).square().mean().item()
        assert rotated < 0.4 * by_hand

    def test_balance_beats_that_rounding_where_tokens_stand_out(self, name, nbits):
        states = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(1))
        states[:, :, ::40] *= 30
        length = states.norm(dim=-1, keepdim=True)
        by_hand = round_by_hand(states.unflatten(2, (-1, 64)), nbits, dim=3).flatten(2, 3)
        wrong = [((values - states) / length).square().mean() for values in (read_values(name, states), by_hand)]
        assert wrong[0] < 0.05 * wrong[1]

    def test_without_both_it_is_rounding_along_the_tokens(self, name, nbits):
        states = self.outliers()
        by_hand = round_by_hand(states.unflatten(2, (-1, 64)), nbits, dim=3).flatten(2, 3)
        plain = read_values(name, states, rotation_v="none", balance_v="none")
        expected = (by_hand - states).square().mean().item()
        assert (plain - states).square().mean().item() == pytest.approx(expected, rel=0.02)


def test_more_bits_bring_the_next_token_closer_to_full_precision(model):
    tokens = torch.randint(1, 199, (2, 320), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = model(tokens).logits[:, 256:].log_softmax(-1)
        divergences = [read_divergence(model, tokens, exact, KVQ(preset=name, residual_length=0)) for name in NAMES]
    assert divergences[1] > 0, "of 8 bits as little is left as of rounding"
    for finer, coarser in itertools.pairwise(divergences):
        assert finer < 0.5 * coarser


def read_divergence(model, tokens, exact, cache):
    model(tokens[:, :256], past_key_values=cache)
    found = model(tokens[:, 256:], past_key_values=cache).logits.log_softmax(-1)
    assert cache.layers[0].side("key").store.length >= 192
    return (exact.exp() * (exact - found)).sum(-1).mean().item()
