"""`kvq bench`: a small run from end to end, and wrong input."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from kvq.cli.bench import choose_lengths

SMALL = (
    "bench",
    "--length",
    "256",
    "--batch",
    "1",
    "--rounds",
    "3",
    "--flushes",
    "1",
    "--layers",
    "0",
    "--deep",
    "0",
    "--no-peers",
)


def test_a_small_run_prints_a_table_and_writes_what_it_measured(call_kvq, tmp_path):
    files = ("--out", str(tmp_path / "speed.json"), "--picture", str(tmp_path / "speed.png"))
    done = call_kvq(*SMALL, "--dtype", "float32", "--backend", "native", "--threads", "1", *files)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    document = json.loads((tmp_path / "speed.json").read_text())
    (facts,) = document["layer"]
    labels = [one["label"] for one in facts["contenders"]]
    assert len(labels) == 6
    assert all(label in done.stdout for label in labels)
    assert document["machine"]["threads"] == 1
    assert document["machine"]["versions"]["torch"]
    assert document["memory_tool"] == "torch.profiler memory events"
    assert document["options"]["rounds"] == 3
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_a_whole_model_is_measured_in_single_steps_chunks_drafts_and_many_steps(call_kvq, monkeypatch, tmp_path):
    facts = {"shape": {"layers": 1}, "length": 256, "batch": 1, "dtype": "float32", "contenders": []}
    # Its test is in tests/benchmark: each contender starts a process of its own.
    monkeypatch.setattr("kvq.benchmark.first_token.measure_first_tokens", lambda *_: facts)
    whole = ("--layers", "1", "--chunk", "8", "--draft", "3", "--steps", "4", "--dtype", "float32")
    out = tmp_path / "speed.json"
    done = call_kvq(*SMALL, *whole, "--backend", "native", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "8 tokens at once" in done.stdout
    assert "3 tokens at once, 2 taken back" in done.stdout
    assert "4 steps in a row" in done.stdout
    document = json.loads(out.read_text())
    assert [(one["tokens"], one["rejected"]) for one in document["forwards"]] == [(8, 0), (3, 2)]
    assert [one["steps"] for one in document["steps"]] == [4]
    assert len(document["model"][0]["contenders"]) == 5


def test_many_cheap_layers_are_measured_beside_full_precision(call_kvq, monkeypatch, tmp_path):
    monkeypatch.setattr(import_module("kvq.cli.bench"), "DEEP_LENGTHS", (300, 200))
    out = tmp_path / "speed.json"
    done = call_kvq(*SMALL, "--deep", "5", "--dtype", "float32", "--backend", "native", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "a model of 5 layers, 300 tokens, batch 1, float32" in done.stdout
    facts, longer = json.loads(out.read_text())["deep"]
    assert (facts["length"], longer["length"]) == (200, 300)
    assert facts["shape"]["heads"] * facts["shape"]["head_dim"] == 128
    labels = {one["label"]: len(one["samples_ms"]["step"]) for one in facts["contenders"]}
    assert labels == {"DynamicCache": 3, "buffer, packed queries": 3, "kvq native 4, fused": 3}


@pytest.mark.parametrize(
    ("longest", "lengths", "prompts"),
    [
        (8192, [256, 4096, 7680], [2048]),
        (None, [256, 4096, 8192], [2048, 8192]),
        (2048, [256, 1536], []),
        (300, [64], []),
    ],
)
def test_a_model_is_measured_at_lengths_that_fit_it(longest, lengths, prompts):
    given = {"length": None, "prompt": None}
    usual = {"length": [2048, 32768], "prompt": [2048, 8192]}
    assert choose_lengths(usual, given, longest) == {"length": lengths, "prompt": prompts}
    asked = {"length": [100_000], "prompt": [90_000]}
    assert choose_lengths(asked, asked, longest) == asked


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dtype", "int7"), "'int7' is not accepted: float32, bfloat16, float16"),
        (("--backend", "nonsense"), "nonsense"),
        (("--device", "cuda:99"), "'cuda:99' cannot be used here"),
        (("--backend", "native", "--config", "x.yaml"), "cannot be combined"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--out", "no/such/folder/file.json"), "cannot be written"),
        (("--model", "no/such/model"), "no/such/model"),
        (("--bits", "3", "--backend", "quanto"), "nbits"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(call_kvq, arguments, told):
    done = call_kvq("bench", "--quick", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    first, *faults = done.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert all(fault.startswith("  ") for fault in faults)


@pytest.mark.parametrize(
    "arguments", [("--length", "10"), ("--rounds", "1"), ("--batch", "0"), ("--bits", "9"), ("--draft", "1")]
)
def test_numbers_out_of_range_are_refused(call_kvq, arguments):
    done = call_kvq("bench", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
