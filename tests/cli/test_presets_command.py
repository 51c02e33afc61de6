"""`kvq presets`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from kvq import KVQCacheConfig
from kvq.config import PRESETS
from kvq.planning import plan

NAMES = ["8bit", "4bit", "3bit", "2bit"]


@pytest.fixture
def listed(call_kvq):
    done = call_kvq("presets", "--json")
    assert done.returncode == 0
    return json.loads(done.stdout)


def test_each_preset_has_a_line(run_kvq):
    done = run_kvq("presets", COLUMNS=200)
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert list(lines)[1:6] == [*NAMES, "none"]
    for name, nbits in zip(NAMES, (8, 4, 3, 2), strict=True):
        assert f"native   {nbits} / {nbits}" in lines[name]
        assert "hadamard / hadamard" in lines[name]
    assert "quanto   4 / 2" in lines["none"]
    assert "auto / auto" in lines["none"]


def test_json_has_the_fields_that_a_configuration_gets(listed):
    assert [one["name"] for one in listed["presets"]] == NAMES
    for one in listed["presets"]:
        assert one["fields"] == PRESETS[one["name"]]
    default = listed["default"]
    assert (default["name"], default["fields"]["nbits_k"], default["fields"]["nbits_v"]) == (None, 4, 2)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_bits_are_those_that_a_plan_finds(listed, head_dim):
    sizes = dict(
        hidden_size=2 * head_dim, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9
    )
    for one in [*listed["presets"], listed["default"]]:
        config = KVQCacheConfig(**one["fields"])
        layer = plan(LlamaConfig(**sizes), config, context=1000, dtype=torch.bfloat16).layers[0]
        found = one["effective_bits"][str(head_dim)]
        assert found == {"key": layer.key.effective_bits, "value": layer.value.effective_bits}


def test_scales_and_middles_of_groups_of_64_and_a_byte_a_token_take_part_of_a_bit(listed):
    """Five eighths of a bit; two bytes less a group where scales and middles are bytes, and 8 bytes a block more."""
    bits = {one["name"]: one["effective_bits"]["64"] for one in listed["presets"]}
    in_bytes = 3 / 8 + 8 * 8 / 64**2
    expected = [4.625, 3 + in_bytes, 2 + in_bytes]
    assert [bits[name]["value"] for name in NAMES[1:]] == pytest.approx(expected, abs=0.003)


def test_the_divergence_is_that_of_the_committed_results_and_grows_with_fewer_bits(listed):
    divergences = [one["kl"] for one in listed["presets"]]
    assert None not in divergences
    assert divergences == sorted(divergences)
    assert listed["measured"]["model"]


def test_the_help_names_every_key(call_kvq, listed):
    told = set(call_kvq("presets", "--help").stdout.replace("\n", " ").split('"')[1::2])
    keys = set(listed) | set(listed["presets"][0]) | set(listed["measured"]) | {"key", "value"}
    assert keys <= told


def test_a_file_with_a_preset_is_checked_as_its_fields(call_kvq, tmp_path):
    (tmp_path / "small.yaml").write_text("preset: 3bit\nresidual_length: 64\n")
    done = call_kvq("check", "small.yaml")
    assert done.returncode == 0
    assert "the newest 64 and the first 4 tokens" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("all ")]
    assert [row[1:8] for row in rows] == [
        ["keys", "native", "3", "per_channel", "64", "hadamard", "rms"],
        ["values", "native", "3", "per_channel", "64", "hadamard", "rms"],
    ]


def test_an_unknown_preset_in_a_file_is_a_fault(call_kvq, tmp_path):
    (tmp_path / "wrong.yaml").write_text("preset: 1bit\n")
    done = call_kvq("check", "wrong.yaml")
    assert done.returncode == 1
    assert "preset: '1bit' is not accepted: a preset is one of '8bit', '4bit', '3bit', '2bit'" in " ".join(
        done.stderr.split()
    )


def test_a_plan_reads_one(call_kvq, tmp_path):
    LlamaConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=2).save_pretrained(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text("preset: 2bit\n")
    done = call_kvq("plan", "--model", "model", "--context", "1000", "--config", "tiny.yaml", "--json")
    key = json.loads(done.stdout)["layers"][0]["key"]
    assert (key["backend"], key["nbits"], key["rotation"]) == ("native", 2, "hadamard")
