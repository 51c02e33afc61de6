"""`kvq bench`: a small run from end to end, and wrong input."""

from __future__ import annotations

import json

import pytest

SMALL = ("bench", "--length", "256", "--batch", "1", "--rounds", "3", "--flushes", "1", "--layers", "0", "--no-peers")


def test_a_small_run_prints_a_table_and_writes_what_it_measured(run_kvq, tmp_path):
    files = ("--out", str(tmp_path / "speed.json"), "--picture", str(tmp_path / "speed.png"))
    done = run_kvq(*SMALL, "--dtype", "float32", "--backend", "native", "--threads", "1", *files, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    document = json.loads((tmp_path / "speed.json").read_text())
    (facts,) = document["layer"]
    labels = [one["label"] for one in facts["contenders"]]
    assert len(labels) == 5
    assert all(label in done.stdout for label in labels)
    assert document["machine"]["threads"] == 1
    assert document["machine"]["versions"]["torch"]
    assert document["memory_tool"] == "torch.profiler memory events"
    assert document["options"]["rounds"] == 3
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


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
def test_bad_input_is_one_line_and_exit_code_2(call_kvq, arguments, told):
    done = call_kvq("bench", "--quick", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--length", "10"), ("--rounds", "1"), ("--batch", "0"), ("--bits", "9")])
def test_numbers_out_of_range_are_refused(run_kvq, arguments):
    done = run_kvq("bench", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
