"""`kvq check`; that a file is missing is wrong usage, tested with the command line as a whole."""

from __future__ import annotations

import json

import pytest

from kvq.testing import CHECKS

NAMES = {check.__name__ for check in CHECKS}
GOOD = """
backend: toy
nbits_v: 4
residual_length: 96
layers:
  "0-1": {full_precision: true}
  "last:2": {q_group_size: 32}
  "4": {q_group_size: 32, axis_value: per_token}
"""
FAULTY = """
nbits: 4
nbits_k: 5
residual_length: -1
"""
TIGHT = """
nbits_v: 4
backend: toy
layers: {"3": {axis_key: per_token, axis_value: per_token, q_group_size: 2}}
"""


def test_a_good_file_is_summarized(run_kvq, toy_path, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    done = run_kvq("check", "good.yaml", "--head-dim", "64", PYTHONPATH=toy_path, COLUMNS=200)
    assert done.returncode == 0
    assert "newest 96 and the first 4 tokens" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    # Codes of 4 bits; scale and mid, 16 bits each, for a group; a byte for a block; a byte for 64 elements of a token.
    steps, others = ("hadamard", "rms", "none", "nearest"), f"{4 + 2 * 16 / 64 + 8 / (64 * 64) + 8 / 64:.3f}"
    assert ["all", "others", "keys", "toy", "4", "per_channel", "64", *steps, others] in rows
    assert ["0-1", "values", "full", "precision", *"--------"] in rows
    last = f"{4 + 2 * 16 / 32 + 8 / (32 * 64) + 8 / 64:.3f}"
    assert ["last:2", "values", "toy", "4", "per_channel", "32", *steps, last] in rows
    assert ["4", "values", "toy", "4", "per_token", "32", *["none"] * 3, "nearest", "5.004"] in rows, "8 / (32 * 64)"


def test_codes_that_suit_the_queries_are_named(run_kvq, tmp_path):
    (tmp_path / "chosen.yaml").write_text("{backend: native, rounding_k: error_feedback, calibration: standard}")
    rows = [line.split() for line in run_kvq("check", "chosen.yaml", COLUMNS=200).stdout.splitlines()]
    assert [row[-2] for row in rows if row[:2] in (["all", "keys"], ["all", "values"])] == ["error_feedback", "nearest"]


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
        (
            "colons.yaml",
            "a: b: c",
            ['  configuration: the file cannot be parsed: mapping values are not allowed here in "colons.yaml"'],
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


class TestContract:
    """A backend is held to the contract: what is shown, and the exit code."""

    def test_a_right_backend_keeps_it(self, call_kvq, judged_path):
        done = call_kvq("check", "right", PYTHONPATH=judged_path)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = {cells[0]: cells[1:] for line in done.stdout.splitlines() if (cells := line.split())}
        assert set(rows) >= NAMES
        assert rows["check_layout"] == ["passed", "1/1"]
        assert rows["check_fused_scores"][:3] == ["not", "applicable", "-"]
        assert done.stdout.splitlines()[-1] == f"right keeps the contract: {len(NAMES)} checks, {len(NAMES)} runs"

    def test_the_json_of_a_right_backend(self, call_kvq, judged_path):
        done = call_kvq(
            "check", "right", "--only", "check_layout", "--only", "check_fused_scores", "--json", PYTHONPATH=judged_path
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["backend"], found["passed"]) == ("right", True)
        assert [(row["check"], row["case"], row["outcome"]) for row in found["results"]] == [
            ("check_layout", "8-per_token", "passed"),
            ("check_fused_scores", "8-per_token", "not applicable"),
        ]
        assert [bool(row["reason"]) for row in found["results"]] == [False, True]

    def test_a_wrong_backend_is_named_with_the_check_and_the_reason(self, call_kvq, judged_path):
        done = call_kvq(
            "check", "wrong", "--only", "check_deterministic", "--only", "check_layout", PYTHONPATH=judged_path
        )
        assert done.returncode == 1
        (row,) = [line for line in done.stdout.splitlines() if line.startswith("check_deterministic")]
        assert row.split()[1:3] == ["failed", "0/1"]
        assert "8-per_token: " in done.stdout
        assert done.stdout.splitlines()[-1] == "wrong fails 1 of 2 checks"

    def test_the_json_of_a_wrong_backend(self, call_kvq, judged_path):
        done = call_kvq("check", "wrong", "--only", "check_deterministic", "--json", PYTHONPATH=judged_path)
        assert done.returncode == 1
        found = json.loads(done.stdout)
        assert found["passed"] is False
        (row,) = found["results"]
        assert (row["check"], row["outcome"]) == ("check_deterministic", "failed")
        assert row["reason"]


class TestParts:
    """Only some of the runs, chosen or because somebody has waited long enough."""

    def runs_of(self, done):
        return [(one["check"], one["case"]) for one in json.loads(done.stdout)["results"]]

    def test_fast_takes_the_fewest_and_the_most_bits(self, call_kvq):
        done = call_kvq("check", "native", "--fast", "--only", "check_codes", "--only", "check_spec", "--json")
        assert done.returncode == 0, done.stderr
        assert self.runs_of(done) == [
            ("check_spec", "1-per_token"),
            *(("check_codes", f"{bits}-{axis}") for bits in (1, 8) for axis in ("per_token", "per_channel")),
        ]

    def test_bits_are_chosen(self, call_kvq):
        chosen = ("--bits", "4", "--bits", "3", "--bits", "6")
        done = call_kvq("check", "native", *chosen, "--only", "check_codes", "--json")
        assert [case for _, case in self.runs_of(done)] == [
            f"{n}-per_{w}" for n in (3, 4, 6) for w in ("token", "channel")
        ]
        done = call_kvq("check", "native", "--fast", *chosen, "--only", "check_codes", "--json")
        assert {case[0] for _, case in self.runs_of(done)} == {"3", "6"}

    def test_bits_that_it_lacks_are_refused(self, call_kvq):
        done = call_kvq("check", "quanto", "--bits", "4", "--bits", "5", "--bits", "2.5")
        assert (done.returncode, done.stdout) == (2, "")
        assert "quanto has no codes of 2.5, 5 bits; choose among 2, 4, 8" in done.stderr

    def test_neither_is_for_a_file(self, call_kvq, tmp_path):
        (tmp_path / "good.yaml").write_text("nbits_k: 4")
        done = call_kvq("check", "good.yaml", "--fast", "--bits", "4")
        assert done.returncode == 2
        assert "--bits and --fast can be given for a backend only" in done.stderr

    @pytest.fixture
    def interrupted(self, monkeypatch):
        """Ctrl-C in the fourth run: the first check has two, so the second is cut off."""
        from kvq.testing import contract

        count = iter(range(100))

        def run(check):
            if next(count) == 3:
                raise KeyboardInterrupt
            return ("failed", "too coarse") if check.name == "check_codes" else ("passed", "")

        monkeypatch.setattr(contract, "_run", run)
        return "check", "native", "--bits", "4", "--only", "check_layout", "--only", "check_codes"

    @pytest.mark.case("Ctrl-C during `kvq check NAME`", "the results so far are printed, and the exit code is 130")
    def test_ctrl_c_keeps_the_results(self, call_kvq, interrupted):
        done = call_kvq(*interrupted)
        assert done.returncode == 130
        rows = [line.split() for line in done.stdout.splitlines()]
        assert rows[1] == ["check_layout", "passed", "2/2"]
        assert rows[2] == ["check_codes", "failed", "0/1", "4-per_token:", "too", "coarse"]
        assert done.stdout.splitlines()[-1] == "native: interrupted after 3 of 4 runs, 1 checks failed by then"
        assert done.stderr == ""

    def test_ctrl_c_keeps_the_json_whole(self, call_kvq, interrupted):
        done = call_kvq(*interrupted, "--json")
        assert done.returncode == 130
        found = json.loads(done.stdout)
        assert (found["passed"], found["interrupted"], len(found["results"])) == (False, True, 3)

    def test_a_row_is_there_as_soon_as_its_check_is_done(self, call_kvq, monkeypatch, capsys):
        from kvq.testing import contract

        shown = []

        def run(check):
            shown.append(capsys.readouterr().out)
            return "passed", ""

        monkeypatch.setattr(contract, "_run", run)
        call_kvq("check", "native", "--bits", "4", "--only", "check_layout", "--only", "check_codes")
        assert ["check_layout" in text for text in shown] == [False, False, True, False]


def test_the_embedded_model_is_no_reason_for_a_word(call_kvq):
    """Its keys have a bias, which per-token groups mind; the kit chose it."""
    checks = ("--only", "check_generation", "--only", "check_fused_attention")
    done = call_kvq("check", "native", "--bits", "4", *checks)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
