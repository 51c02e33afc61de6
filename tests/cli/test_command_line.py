"""The command line as a whole: help, version, wrong usage, and how errors leave it."""

from __future__ import annotations

import pytest

from kvq import __version__

REPORT_MODULES = """
import sys
from kvq.cli import main
sys.argv = ["kvq", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
TINY_BENCH = (
    *("--length", "256", "--batch", "1", "--rounds", "3", "--flushes", "1", "--layers", "0", "--deep", "0"),
    *("--no-peers", "--dtype", "float32", "--backend", "native", "--threads", "1"),
)
TINY_EVAL = ("--dataset", "recall-report", "--sequences", "2", "--length", "200", "--needles", "0", "--no-peers")
RAISE = """
import sys
from kvq.cli import app, main
from kvq.errors import KVQError
sys.argv = ["kvq", "fail"]
@app.command()
def fail():
    raise {error}
main()
"""


def test_help_is_light_and_tells_the_exit_codes(run):
    done = run("-c", REPORT_MODULES, "--help")
    assert done.returncode == 0
    for word in ("backends", "check", "plan", "doctor", "--version", "Exit codes: 0 fine", "2 wrong"):
        assert word in done.stdout
    imported = done.stderr.split("imported:")[1].split()
    assert "kvq" in imported
    assert not {"torch", "transformers", "optimum", "hqq"} & set(imported)


def test_version_is_light_and_plain(run):
    done = run("-c", REPORT_MODULES, "--version")
    assert (done.returncode, done.stdout) == (0, f"kvq {__version__}\n")
    assert not {"torch", "transformers", "optimum", "hqq"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bakends"], "bakends"),
        (["backends", "--jason"], "--jason"),
        (["check"], "FILE|NAME"),
        (["check", "missing.yaml"], "'missing.yaml' does not exist"),
        (["check", "qanto"], "backend 'qanto' is unknown; did you mean 'quanto'?"),
        (["check", "native", "--only", "check_nothing"], "there is no check 'check_nothing'"),
        (["check", "native", "--option", "clip"], "'clip' is not KEY=VALUE"),
        (["check", "quanto.conf"], "'quanto.conf' is not a file; give the path of a configuration file (.yaml, .yml"),
        (["check", "."], "'.' is a directory"),
        (["check", "missing.yaml", "--head-dim", "0"], "--head-dim"),
    ],
)
def test_wrong_usage_exits_with_2(call_kvq, args, message):
    done = call_kvq(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.costly
@pytest.mark.parametrize(
    ("command", "args", "told"),
    [
        ("backends", ("--json",), '"backends"'),
        ("bench", TINY_BENCH, "kvq native 4"),
        ("demo", ("--contexts", "2", "--questions", "2", "--backend", "native"), "native"),
        ("eval", TINY_EVAL, "full precision"),
        ("plan", ("--model", "embedded", "--context", "961"), "655,488 parameters"),
    ],
    ids=["backends", "bench", "demo", "eval", "plan"],
)
def test_a_process_of_its_own_says_nothing_on_stderr(run_kvq, command, args, told):
    done = run_kvq(command, *args, HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert told in done.stdout


def test_an_error_of_kvq_is_one_line(run):
    done = run("-c", RAISE.format(error='KVQError("a sentence\\n  in \\u00d7 two lines")'), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a sentence in \\xd7 two lines\n"


def test_an_unexpected_error_keeps_its_traceback(run):
    done = run("-c", RAISE.format(error='RuntimeError("a bug")'))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: a bug\n")
