"""`kvq demo --model` as a user meets it, on a tiny random model."""

from __future__ import annotations

import re

import pytest
from foreign_model import save_foreign_model

from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH

BITS = ("K8V8", "K4V4", "K4V2", "K2V4", "K2V2")


@pytest.fixture
def folder(tmp_path):
    return save_foreign_model(tmp_path / "foreign")


def test_a_language_model_reads_a_text_and_continues_it(call_kvq, folder):
    done = call_kvq("demo", "--model", str(folder), "-b", "native", "-b", "hqq")
    assert (done.returncode, done.stderr) == (0, "")
    figures, _, texts = done.stdout.partition("\n\n")
    assert figures.startswith(f"{folder} on topics-report: 1 sequence of 640 tokens, 128 of them scored")
    labels = [f"{backend} {bits}" for backend in ("native", "hqq") for bits in BITS]
    rows = [re.split("  +", line) for line in figures.splitlines()[4:]]
    assert [row[0] for row in rows] == ["cache", "full precision", *labels]
    divergence = {row[0]: float(row[1]) for row in rows[2:]}
    assert 0 < divergence["native K8V8"] < divergence["native K4V4"] < divergence["native K2V2"]
    assert all(row[-1].endswith("x") and float(row[-1][:-1]) > 1 for row in rows[2:])
    assert [line.partition(":")[0].strip() for line in texts.splitlines()[1:]] == ["full precision", *labels]


def test_a_text_is_shown_up_to_where_it_parts(call_kvq, folder):
    texts = call_kvq("demo", "--model", str(folder), "-b", "native").stdout.partition("\n\n")[2].splitlines()[1:]
    expected = texts[0].partition("full precision: ")[2]
    parted = [re.search(r"parts after \d+ tokens?: (.*) \| (.*)", line) for line in texts[1:]]
    assert any(parted), "nothing would be shown"
    for found in filter(None, parted):
        shared, own = found.groups()
        assert expected.startswith(shared)
        assert not expected[len(shared) :].strip().startswith(own)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "no/such"), "model 'no/such' cannot be loaded"),
        (("--model", "none.gguf"), "'none.gguf' does not exist"),
        (("--model", "short"), "the demo reads 640 tokens, but the model has 512 positions"),
        (("--model", str(EMBEDDED_MODEL_PATH)), "this is the embedded model, which knows no text: leave out --model"),
        (("--model", "short", "--questions", "3"), "--questions is about the questions to the embedded model"),
        (("--model", "short", "-b", "none"), "backend 'none' is unknown"),
    ],
)
def test_what_is_wrong_is_one_line(call_kvq, tmp_path, args, message):
    save_foreign_model(tmp_path / "short", positions=512)
    done = call_kvq("demo", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
