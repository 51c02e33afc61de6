"""What is wrong is told in one message before anything is measured, with exit code 2 and never a traceback."""

from __future__ import annotations

import errno
import os

import pytest

EVAL = ("eval", "--dataset", "recall-report", "--needles", "0", "--no-peers")
BENCH = ("bench", "--quick", "--backend", "native", "--no-peers")
PLAN = ("plan", "--model", "embedded", "--context", "100")
LONG = "x" * 300


@pytest.fixture
def call_beside_files(call_kvq, tmp_path):
    """Return a function that runs a command beside a folder and some files."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.txt").write_text("no configuration")
    (tmp_path / "good.yaml").write_text("nbits_v: 4")
    return call_kvq


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "-b", "größe"], "backend 'größe' is unknown"),
        (["demo", "-b", ""], "backend '' is unknown"),
        (["demo", "--contexts", "0"], "'--contexts'"),
        (["demo", "--questions", "-1"], "'--questions'"),
        (["demo", "--questions", "20", "--records", "16"], "--questions 20 is more than --records 16"),
        (["demo", "--seed", "-1"], "'--seed'"),
        (["demo", "--seed", str(2**70)], "'--seed'"),
        (["check", ""], "'' is not a file"),
        (["check", "folder"], "'folder' is a directory"),
        (["check", LONG + ".yaml"], "does not exist"),
        (["check", LONG], "is unknown"),
        (["check", "a\0.yaml"], "does not exist"),
        (["check", "good.yaml", "--json"], "--json can be given for a backend only, and 'good.yaml' is a file"),
        (
            ["check", "good.yaml", "--only", "x", "--option", "a=1"],
            "--only and --option can be given for a backend only",
        ),
        (["check", "native", "--option", "clip=[1"], "--option 'clip=[1' has no value that YAML can read"),
        ([*EVAL, "--out", "folder"], "'folder' cannot be written: it is a folder"),
        ([*EVAL, "--out", "no/such.json"], "'no/such.json' cannot be written: there is no folder"),
        ([*EVAL, "--out", "plain.txt/a.json"], "'plain.txt/a.json' cannot be written: there is no folder"),
        ([*EVAL, "--out", LONG], "cannot be written: File name too long"),
        ([*EVAL, "--out", "a.png", "--picture", "a.png"], "--out and --picture are the same file"),
        ([*EVAL, "--picture", "a.gif"], "'a.gif' is not a picture file: use .png, .svg or .pdf"),
        ([*EVAL, "-c", "folder"], "'folder' is a directory; give a configuration file in it"),
        ([*EVAL, "-c", "missing.yaml"], "'missing.yaml' does not exist; give the path of a configuration file"),
        ([*BENCH[:2], "-c", "missing"], "'missing' is not a file; give the path of a configuration file"),
        ([*PLAN, "--config", "missing.yaml"], "'missing.yaml' does not exist; give the path of a configuration file"),
        ([*PLAN, "--config", "folder"], "'folder' is a directory; give a configuration file in it"),
        (["eval", "--text", "missing.txt"], "--text 'missing.txt' does not exist; give the path of a text file"),
        (["eval", "--text", "folder"], "--text 'folder' is a directory; give a text file in it"),
        ([*EVAL, "--device", "foo"], "device 'foo' is unknown; use e.g. cpu or cuda"),
        ([*BENCH, "--device", "foo"], "device 'foo' is unknown; use e.g. cpu or cuda"),
        ([*EVAL, "--sequences", "0"], "'--sequences'"),
        ([*EVAL, "--sequences", str(10**14)], "'--sequences'"),
        ([*EVAL, "--step", "-1"], "'--step'"),
        ([*BENCH, "--out", ""], "'.' cannot be written: it is a folder"),
        ([*BENCH, "--picture", "größe"], "'größe' is not a picture file"),
        ([*BENCH, "--threads", "0"], "'--threads'"),
        ([*BENCH, "--threads", str(10**12)], "'--threads'"),
        ([*BENCH, "--limit", "nan"], "'--limit'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_one_message_and_exit_code_2(call_beside_files, args, message):
    done = call_beside_files(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", [EVAL, BENCH[:2], PLAN], ids=["eval", "bench", "plan"])
def test_each_fault_of_a_configuration_has_its_line(call_kvq, tmp_path, command):
    (tmp_path / "faulty.yaml").write_text("nbits_k: 99\nresidual_length: -1\n")
    done = call_kvq(*command, "--config", "faulty.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    first, *faults = done.stderr.splitlines()
    assert first == "error: faulty.yaml has 2 faults"
    assert [fault.split(":")[0].strip() for fault in sorted(faults)] == ["nbits_k", "residual_length"]


@pytest.mark.parametrize("command", [EVAL, BENCH], ids=["eval", "bench"])
def test_a_folder_without_permission_is_told_of_first(call_beside_files, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    done = call_beside_files(*command, "--out", "a.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'a.json' cannot be written: permission is denied\n"


def test_a_backend_that_is_named_twice_is_measured_once(call_kvq):
    small = ("--contexts", "1", "--questions", "1", "--records", "16")
    done = call_kvq("demo", "-b", "native", "-b", "native", *small)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()].count(["native", "K4V2"]) == 1


class Output:
    """Standard output that fails at its first row."""

    encoding = "utf-8"

    def __init__(self, error, file):
        self.error = error
        self.file = file

    def isatty(self):
        return False

    def fileno(self):
        return self.file.fileno()

    def write(self, text):
        raise self.error

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the output could not be written"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["full disk", "closed pipe", "Ctrl-C"],
)
def test_an_output_that_fails_leaves_no_traceback(call_kvq, monkeypatch, tmp_path, error, code, message):
    with (tmp_path / "output").open("w") as file:
        monkeypatch.setattr("sys.stdout", Output(error, file))
        done = call_kvq("check", "native", "--only", "check_spec")
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
