"""`kvq check`; that a file is missing is wrong usage, tested with the command line as a whole."""

from __future__ import annotations

import json

import pytest

GOOD = """
backend: toy
nbits_v: 4
residual_length: 96
layers:
  "0-1": {full_precision: true}
  "last:2": {q_group_size: 32}
"""
FAULTY = """
nbits: 4
nbits_k: 5
residual_length: -1
"""
TIGHT = """
nbits_v: 4
backend: toy
layers: {"3": {axis_key: per_token, q_group_size: 2}}
"""


def test_a_good_file_is_summarized(run_kvq, toy_path, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    done = run_kvq("check", "good.yaml", "--head-dim", "64", PYTHONPATH=toy_path)
    assert done.returncode == 0
    assert "newest 96 and the first 4 tokens" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["all", "others", "keys", "toy", "4", "per_channel", "64", "none", "4.502"] in rows
    assert ["0-1", "values", "full", "precision", *"-----"] in rows
    # 32 codes of 4 bits, scale and mid of 16 bits, and a byte for a block of 32 tokens of 64 elements.
    assert ["last:2", "values", "toy", "4", "per_token", "32", "none", f"{4 + 2 * 16 / 32 + 8 / (32 * 64):.3f}"] in rows


@pytest.mark.parametrize(
    ("name", "text", "faults"),
    [
        (
            "faulty.yaml",
            FAULTY,
            ["  nbits_k: 5 is not", "  residual_length: -1 is not", "  nbits: is unknown; did you"],
        ),
        (
            "tight.yml",
            TIGHT,
            [
                # In groups this short the mid has 32 bits.
                f"  layers['3'].q_group_size: 2 gives {4 + (16 + 32) / 2:.1f} effective bits for the {side}s"
                for side in ("key", "value")
            ],
        ),
        ("unknown.yaml", "backend: qanto", ["  backend 'qanto' is unknown; did you mean"]),
        (
            "unsafe.yaml",
            "backend: !!python/object/apply:os.mkdir [done]",
            ["  configuration: the file cannot be parsed"],
        ),
        ("broken.json", '{"nbits_k": ', ["  configuration: the file cannot be parsed"]),
    ],
)
def test_a_wrong_file_shows_every_fault(call_kvq, toy_path, tmp_path, name, text, faults):
    (tmp_path / name).write_text(text)
    done = call_kvq("check", name, PYTHONPATH=toy_path)
    assert (done.returncode, done.stdout) == (1, "")
    first, *lines = done.stderr.splitlines()
    assert first == f"error: {name} has {len(faults)} fault{'s' if len(faults) > 1 else ''}"
    assert len(lines) == len(faults)
    assert all(line.startswith(fault) for line, fault in zip(lines, faults, strict=True))
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_what_a_backend_prints_while_it_is_checked_is_no_result(call_kvq, monkeypatch, options):
    from kvq.testing import contract

    def run(check):
        print("noise of a vendor")
        return "passed", ""

    monkeypatch.setattr(contract, "_run", run)
    done = call_kvq("check", "native", "--only", "check_accuracy", *options)
    assert done.returncode == 0, done.stderr
    assert "noise" not in done.stdout
    assert "noise of a vendor" in done.stderr
    if options:
        assert json.loads(done.stdout)["passed"] is True
