"""`kvq eval` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvq.evaluation.quality import candidates
from kvq.evaluation.quality.report import LEGEND

SMALL = ("--dataset", "recall-report", "--sequences", "2", "--length", "300", "--step", "16", "--batch-size", "1")
QUICK = (*SMALL, "--needles", "0", "--no-peers")


@pytest.fixture
def call_eval(call_kvq, tmp_path):
    """Return a function that runs `kvq eval` beside some configurations in this process."""
    (tmp_path / "k4v4.yaml").write_text("{nbits_k: 4, nbits_v: 4, residual_length: 32}")
    (tmp_path / "k2v2.yaml").write_text(
        "{nbits_k: 2, nbits_v: 2, residual_length: 32, rotation_k: none, rotation_v: none}"
    )
    (tmp_path / "faulty.yaml").write_text("nbits: 4")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k4v4.yaml").write_text("nbits_v: 4")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return lambda *args: call_kvq("eval", *args)


def test_a_run_is_a_table_a_file_and_a_picture(call_eval, tmp_path):
    configs = ("--config", "k4v4.yaml", "--config", "k2v2.yaml")
    outputs = ("--out", "all.json", "--picture", "all.png", "--details")
    done = call_eval(
        *SMALL, "--needles", "1", "--continuation", "8", *configs, *outputs, "--gate", "kl<0.001,compression>1.5"
    )
    assert done.returncode == 1
    assert "error: the gate is not met" in done.stderr
    assert "k2v2: kl<0.001 is not met" in done.stderr
    assert "k4v4" not in done.stderr
    first, tasks, depths, details = done.stdout.split("\n\n")
    said, _, table = first.partition("\ncache ")
    assert said.splitlines()[1:] == [
        "the first 128 tokens of each in full precision, the rest from the cache in steps of 16",
        "1 context with five facts; answers are scored, not written",
        "a greedy continuation of 8 tokens behind 292 of each sequence",
        *LEGEND,
    ]
    rows = {line.split("  ")[0]: line for line in table.splitlines()[1:]}
    assert set(rows) == {"full precision", "k4v4", "k2v2"}
    assert {line.split("  ")[0] for line in tasks.splitlines()[1:]} == {"full precision", "k4v4", "k2v2"}
    assert [line.split("  ")[0] for line in depths.splitlines()[1:]] == ["k4v4"] * 4 + ["k2v2"] * 4
    assert "KL by position" in details
    found = json.loads((tmp_path / "all.json").read_text())
    four, two = found["records"][:2]
    assert (four["label"], two["label"]) == ("k4v4", "k2v2")
    assert four["kl"]["mean"] < two["kl"]["mean"]
    assert four["settings"]["residual_length"] == 32
    assert len(four["kl_by_sequence"]) == found["sequences"] == 2
    assert sum(four["needle_by_depth"].values()) == pytest.approx(5 * four["needle"])
    assert f"{four['compression']:.2f}x" in rows["k4v4"]
    assert (found["format"], found["needle_contexts"], found["continuation"]) == (2, 1, 8)
    assert four["kl_p50"] <= four["kl_p99"] <= four["kl_p999"] < two["kl_p999"]
    assert [run["last"] for run in four["by_depth"]][-1] == found["length"] - 1
    assert four["needle_log_probability"]["mean"] > two["needle_log_probability"]["mean"] - 1
    assert 0 <= two["drift"]["mean"] <= 1
    assert {"kvq", "torch", "transformers"} <= set(found["versions"])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "all.json.parts").exists()


def test_a_gate_that_is_met_exits_with_zero(call_eval):
    done = call_eval(*QUICK, "--config", "k4v4.yaml", "--gate", "kl<0.1,top1>0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "the gate is met: kl<0.1, top1>0.5"


def test_tasks_have_a_table_of_their_own(call_eval, tmp_path):
    done = call_eval(*QUICK, "--config", "k4v4.yaml", "--config", "k2v2.yaml", "--tasks", "1", "--out", "all.json")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.partition("\n\ntasks: log-probability")[2].splitlines()[1:]
    assert table[0].split("  ")[0] == "cache"
    rows = {line.split("  ")[0]: line for line in table[1:]}
    assert list(rows) == ["full precision", "k4v4", "k2v2"]
    found = json.loads((tmp_path / "all.json").read_text())["tasks"]
    figures = {label: scores["several needles"] for label, scores in found.items()}
    assert figures["full precision"]["log_probability"] > figures["k2v2"]["log_probability"] + 0.1
    for label, line in rows.items():
        assert line.endswith(f"{figures[label]['log_probability']:.3f}, {figures[label]['answers_right']:.1%}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*QUICK, "--tasks", "1", "--length", "200"], "200 tokens leave no room for the tasks"),
        (["--model", "no/such", *QUICK], "model 'no/such' cannot be loaded"),
        (["--model", ".", *QUICK], "model '.' cannot be loaded"),
        ([], "give the text: either --text FILE or --dataset ID"),
        (["--text", "k4v4.yaml", "--dataset", "recall-report"], "give the text: either"),
        (["--text", "k4v4.yaml"], "the embedded model knows the words of its own task only"),
        (["--dataset", "stdlib-report"], "use --dataset recall-calibration or recall-report"),
        (["--dataset", "recall-report", "--length", "5000"], "--length 5000 is more than the"),
        (["--dataset", "recall-report", "--length", "200", "--prefill", "200"], "leaves nothing of --length 200"),
        ([*QUICK, "--continuation", "5000"], "--continuation 5000 goes beyond the"),
        ([*QUICK, "--peer", "quanto-3"], "peer 'quanto-3' is unknown; transformers has quanto-4, quanto-2, hqq-4"),
        ([*QUICK, "--gate", "kl<-1"], "can never be met"),
        ([*QUICK, "--gate", "klx<1"], "did you mean 'kl'?"),
        ([*QUICK, "--config", "none.yaml"], "none.yaml"),
        ([*QUICK, "--config", "faulty.yaml"], "nbits: is unknown"),
        ([*QUICK, "-c", "k4v4.yaml", "-c", "other/k4v4.yaml"], "two configurations have the same file name"),
        ([*QUICK, "--dtype", "int8"], "dtype 'int8' is not accepted"),
        ([*QUICK, "--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        ([*QUICK, "--out", "no/such/folder.json"], "'no/such/folder.json' cannot be written"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_measured(call_eval, args, message):
    done = call_eval(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())


def test_an_error_is_one_line_without_a_traceback(call_eval):
    done = call_eval("--model", "no/such", *QUICK)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model 'no/such' cannot be loaded")
    assert done.stderr.count("\n") == 1


def heed_interrupts():
    """Undo what a shell does to the programs that it starts in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.costly
def test_ctrl_c_keeps_what_is_finished(call_eval, tmp_path):
    # A dozen batches: on a busy machine the signal may be seconds late.
    many = ["--sequences", "12", "--batch-size", "1", "--step", "4"]
    args = [*QUICK, "--config", "k4v4.yaml", "--config", "k2v2.yaml", *many, "--out", "all.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kvq", "eval", *args]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    parts = tmp_path / "all.json.parts"
    while not list(parts.glob("*.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "the same command resumes where this one was" in stderr
    assert "Traceback" not in stderr
    assert 1 <= len(list(parts.glob("*.pt"))) < 12
    assert call_eval(*args).returncode == 0
    resumed = json.loads((tmp_path / "all.json").read_text())
    assert call_eval(*args[:-1], "anew.json").returncode == 0
    assert resumed["records"] == json.loads((tmp_path / "anew.json").read_text())["records"]


def test_ctrl_c_in_the_tasks_keeps_what_is_finished(call_eval, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    args = (*QUICK, "--config", "k4v4.yaml", "--out", "all.json", "--tasks", "1")
    with monkeypatch.context() as patch:
        patch.setattr("kvq.cli.eval.score_plan", interrupt)
        done = call_eval(*args)
    assert done.returncode == 130
    assert "the same command resumes where this one was" in done.stderr
    parts = tmp_path / "all.json.parts"
    assert len(list(parts.glob("*.pt"))) == 2
    assert call_eval(*args).returncode == 0
    assert not parts.exists()
    assert "tasks" in json.loads((tmp_path / "all.json").read_text())


def test_a_budget_says_what_it_left_out_and_a_larger_one_goes_on(call_eval, tmp_path):
    args = (*QUICK, "--config", "k4v4.yaml", "--out", "all.json")
    done = call_eval(*args, "--budget-minutes", "0")
    assert done.returncode == 0
    assert "left out for lack of time: 1 of 2 sequences" in done.stdout.splitlines()[-1]
    found = json.loads((tmp_path / "all.json").read_text())
    assert (found["sequences"], found["sequences_planned"]) == (1, 2)
    parts = tmp_path / "all.json.parts"
    assert len(list(parts.glob("*.pt"))) == 1
    assert call_eval(*args, "--budget-minutes", "60").returncode == 0
    assert not parts.exists()
    whole = json.loads((tmp_path / "all.json").read_text())
    assert whole["sequences"] == 2
    assert whole["records"][0]["kl_by_sequence"][:1] == found["records"][0]["kl_by_sequence"]


def test_a_run_with_a_budget_goes_on_without_one(call_eval, tmp_path, monkeypatch):
    """Finished parts are found by their settings: none of them depends on the budget."""
    monkeypatch.setattr("kvq.cli.eval._tidy_up", lambda *_: None)
    sizes = ("--sequences", "5", "--length", "200", "--step", "64", "--needles", "0")
    args = ("--dataset", "recall-report", *sizes, "--config", "k4v4.yaml", "--out", "all.json")
    for budget in (("--budget-minutes", "0"), ()):
        assert call_eval(*args, *budget).returncode == 0
    names = sorted(path.stem.split("-") for path in (tmp_path / "all.json.parts").glob("*.pt"))
    assert [name[-1] for name in names] == ["0", "1"]
    assert names[0][:-1] == names[1][:-1]


def test_what_cannot_be_predicted_is_not_continued_unless_asked_for(call_eval):
    assert "continuation" not in call_eval(*QUICK).stdout
    assert "a greedy continuation of 4 tokens" in call_eval(*QUICK, "--continuation", "4").stdout


def test_a_long_sequence_is_scored_at_its_end(call_eval):
    said = call_eval("--dataset", "recall-report", "--sequences", "1", "--length", "1200", "--needles", "0").stdout
    assert "the first 176 tokens of each in full precision, the rest from the cache in steps of 16" in said


def test_peers_are_measured_on_request(call_eval, monkeypatch):
    # Without quanto's, which compiles an extension at its first step.
    some = {label: options for label, options in candidates.PEERS.items() if label == "transformers hqq 4"}
    monkeypatch.setattr(candidates, "PEERS", some)
    without, beside = call_eval(*SMALL, "--needles", "0"), call_eval(*SMALL, "--needles", "0", "--peers")
    assert "transformers hqq 4" not in without.stdout
    assert "transformers hqq 4" in beside.stdout


def test_a_peer_that_is_named_is_measured_alone_and_once(call_eval):
    said = call_eval(*SMALL, "--needles", "0", "--peer", "hqq-2", "--peer", "hqq-2").stdout
    assert [line.split("  ")[0] for line in said.splitlines() if line.startswith("transformers")] == [
        "transformers hqq 2"
    ]


@pytest.mark.slow
@pytest.mark.costly
def test_two_processes_measure_what_one_does(run, call_eval, tmp_path):
    args = (*QUICK, "--config", "k4v4.yaml", "--needles", "1")
    assert call_eval(*args, "--out", "one.json").returncode == 0
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    done = run(*launcher, *options, "--module", "kvq", "eval", *args, "--out", "two.json", HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity  change") == 1  # one table, of both
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["records"] == two["records"]
