"""`kvq calibrate`: what it writes, where that is of use, and what it refuses."""

from __future__ import annotations

import pytest

from kvq import KVQ, Calibration
from kvq.evaluation.embedded_model import load_embedded_model


def test_its_file_is_the_calibration_of_the_model(call_kvq, tmp_path):
    out = tmp_path / "own.calibration"
    done = call_kvq("calibrate", "--model", "embedded", "--sequences", "2", "--length", "64", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = Calibration.load(out)
    assert (found.layers, found.tokens, found.text) == ([0, 1, 2], 2 * 60, "recall-calibration")
    assert f"3 layers of embedded, 120 tokens of recall-calibration, digest {found.digest}" in done.stdout
    with pytest.warns(UserWarning, match="no effect"):
        KVQ(backend="native", calibration=out, model=load_embedded_model()[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "embedded", "--text", "nowhere.txt"], "--text 'nowhere.txt' does not exist"),
        (["--model", "embedded", "--out", "nowhere/file"], "there is no folder"),
        (["--model", "embedded", "--length", "100000"], "more than the"),
        (["--model", "embedded", "--dataset", "topics-calibration"], "the embedded model knows the words"),
    ],
)
def test_wrong_usage_is_told_in_a_line(call_kvq, options, told):
    done = call_kvq("calibrate", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
