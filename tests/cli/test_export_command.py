"""`kvq export` as a user meets it."""

from __future__ import annotations

import json

import pytest

MEASURED = ("--model", "embedded", "--length", "260", "--sequences", "1")


def test_the_setting_and_what_is_lost_are_printed(call_kvq, tmp_path):
    (tmp_path / "own.yaml").write_text("{backend: native, nbits_k: 8, nbits_v: 4}")
    done = call_kvq("export", "--to", "llama.cpp", "--config", "own.yaml")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:2] == ["llama.cpp: K q8_0, V q4_0", "  llama-server -m MODEL.gguf -fa on -ctk q8_0 -ctv q4_0"]
    assert "  - the window: the newest 32 tokens are read from their codes too" in lines
    found = json.loads(call_kvq("export", "--to", "tensorrt-llm", "-c", "own.yaml", "--json").stdout)
    assert (found["setting"], found["file"]) == ("fp8", ["kv_cache_config:", "  dtype: fp8"])
    assert found["source"].startswith("https://")


def test_with_a_model_the_divergence_of_every_setting_is_measured(call_kvq):
    done = call_kvq("export", "--to", "mlx", *MEASURED, "--all", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    measured = {one["label"]: one["kl"] for one in found["measured"]}
    assert {"the configuration", "8 bits, groups of 32", "4 bits, groups of 32", "2 bits, groups of 32"} <= set(
        measured
    )
    assert 0 <= measured["8 bits, groups of 32"] < measured["4 bits, groups of 32"] < measured["2 bits, groups of 32"]
    table = call_kvq("export", "--to", "mlx", *MEASURED)
    assert [line.split("  ")[0] for line in table.stdout.splitlines()[-3:]] == [
        "full precision",
        "the configuration",
        found["setting"],
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--to", "ollama"), "--to 'ollama' is not an engine that kvq knows; choose one of vllm"),
        (("--to", "vllm", "-c", "missing.yaml"), "'missing.yaml' does not exist"),
        (("--to", "vllm", "--all"), "--all is about measuring, which needs a model"),
        (("--to", "vllm", "--dataset", "topics-report"), "--dataset is about measuring"),
        (("--to", "vllm", "--model", "embedded", "--length", "200", "--prefill", "199"), "leaves nothing"),
        (("--to", "vllm", "--model", "embedded", "--length", "100000"), "is more than the"),
        (("--to", "vllm", "--model", "embedded", "--text", "missing.txt"), "'missing.txt' does not exist"),
        (("--to", "ollama", "--model", "embedded"), "is not an engine"),
        ((), "Missing option '--to'"),
    ],
)
def test_wrong_use_is_told_in_one_line(call_kvq, args, said):
    done = call_kvq("export", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())
