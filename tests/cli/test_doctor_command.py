"""`kvq doctor`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from kvq import __version__
from kvq.attention.dispatch.kernel_registry import KernelRegistry, use_kernel_registry
from kvq.attention.kernels.compiled.library import why_unavailable as why_kernel_unavailable
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.cli.doctor import _kernel_row


def test_a_sound_installation(call_kvq):
    done = call_kvq("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    for name in ("python", "torch", "transformers", "pydantic", "pluggy", "optimum-quanto"):
        assert rows[name][-1] == "ok"
    for name in ("quanto", "hqq"):
        assert f"{name} ready kvq {__version__} works" in [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "threads:" in rows["cpu"]


def test_foreign_problems(run_kvq, toy_path, make_distribution):
    shadow = make_distribution("transformers", "4.40.0")
    (shadow / "transformers.py").write_text("raise ImportError('too old')\n")
    done = run_kvq(
        "doctor",
        "--json",
        PYTHONPATH=os.pathsep.join(map(str, (toy_path, shadow))),
        KVQ_PLUGINS="toy,faulty,quantoo",
        KVQ_BLOCK_PLUGINS="",
    )
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["usable"] is False
    assert found["environment"] | {"KVQ_PLUGINS": "toy,faulty,quantoo", "KVQ_BLOCK_PLUGINS": ""} == found["environment"]
    states = {one["name"]: (one["state"], one["works"]) for one in found["backends"]}
    assert (states["toy"], states["faulty"], states["quanto"]) == (
        ("ready", True),
        ("broken", False),
        ("blocked", False),
    )
    problems = {(one["severity"], one["problem"].split(";")[0].split(" from ")[0]) for one in found["problems"]}
    assert ("error", "transformers 4.40.0 is installed") in problems
    assert ("error", "kvq.cache cannot be imported: ImportError: too old") in problems
    assert ("error", "broken: backend 'faulty'") in problems
    assert ("warning", "KVQ_PLUGINS names 'quantoo', which no plugin offers") in problems
    assert all(one["remedy"] for one in found["problems"])


def test_the_dead_package_and_a_torch_that_cannot_be_imported(run_kvq, make_distribution):
    shadow = make_distribution("kvq", "0.1.0")
    (shadow / "torch.py").write_text("raise ImportError('libtorch.so is missing')\n")
    done = run_kvq("doctor", PYTHONPATH=shadow)
    assert done.returncode == 1
    assert "error: the kvq 0.1.0 of the package index is installed" in done.stdout
    assert "pip uninstall kvq" in done.stdout
    assert "error: torch cannot be imported: ImportError: libtorch.so is missing" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.skipif(why_kernel_unavailable() is not None, reason="no C compiler")
def test_kernels_are_shown_with_what_speaks_for_them_and_tried_when_asked(run_kvq, tmp_path):
    built = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq" / "kernels"
    shutil.copytree(built, tmp_path / "kvq" / "kernels")
    environment = dict(XDG_CACHE_HOME=str(tmp_path), KVQ_KERNEL_TRIALS="on", KVQ_ATTENTION_KERNEL="")
    kernels = [
        {one["name"]: one for one in json.loads(run_kvq("doctor", "--json", *options, **environment).stdout)["kernels"]}
        for options in (["--prove"], [])
    ]
    tried, later = (one["compiled"] for one in kernels)
    assert tried == later
    (file,) = (tmp_path / "kvq" / "verdicts").iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    proof = tried["proof"]
    assert proof["origin"] == "measured here"
    assert {key: proof[key] for key in ("own_ms", "other_ms", "checks", "made_at", "over")} == {
        key: kept[key] for key in ("own_ms", "other_ms", "checks", "made_at", "over")
    }
    assert tried["default"] is proof["passing"] is (kept["own_ms"] < kept["other_ms"])
    assert kernels[0]["eager"]["proof"] is None
    assert kernels[0]["triton"]["reason"] == "runs on cuda only"


@pytest.mark.parametrize(
    ("proof", "text"),
    [
        (None, "ready"),
        (
            dict(origin="measured here", speedup=8.54, over="eager", relative_error=1.6e-6, made_at="2026-01-02"),
            "ready: 8.5 times as fast as eager, error 2e-06 (measured here, 2026-01-02)",
        ),
        (
            dict(origin="shipped record", speedup=2.7, over="full precision", relative_error=5e-7),
            "ready: 2.7 times as fast as full precision, error 5e-07 (shipped record)",
        ),
    ],
)
def test_a_kernel_is_one_line(proof, text):
    one = dict(name="compiled", device="cpu", reason=None, fault=None, proof=proof)
    assert _kernel_row(one) == ("compiled", "cpu", text)
    assert _kernel_row(one | dict(reason="wrong"))[2] == "wrong"
    assert _kernel_row(one | dict(reason="found wrong here: bad", fault="bad"))[2] == "found wrong here: bad"
    named = _kernel_row(one | dict(fault="bad"))[2]
    assert named == "named by KVQ_ATTENTION_KERNEL, but found wrong here: bad"


@pytest.fixture
def wrong_kernel(monkeypatch, tmp_path):
    """A kernel that needs proof and is wrong, before the others; nothing is known of it."""

    class WrongKernel:
        name, device_types, needs_benchmark = "wrong", frozenset({"cpu"}), True
        tried = 0

        def why_unavailable(self):
            return None

        def why_unsupported(self, request):
            return None

        def source_digest(self):
            return "any"

        def attend(self, request):
            self.tried += 1
            return REFERENCE.attend(request) * 1.5

    kernel = WrongKernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVQ_KERNEL_TRIALS", "on")
    with use_kernel_registry(KernelRegistry([kernel, REFERENCE])):
        yield kernel


@pytest.mark.case("kvq doctor where KVQ_ATTENTION_KERNEL names a kernel that is wrong", "its row and a warning say so")
def test_a_wrong_kernel_that_is_named_is_a_problem(call_kvq, wrong_kernel, monkeypatch):
    fault = "it differs from the reference by 5.0e-01 of the largest output in bfloat16 (at most 3e-02 is accepted)"
    for options, name in ((["--prove"], "wrong"), ([], "wrong"), ([], "auto")):
        with use_kernel_registry(KernelRegistry([wrong_kernel, REFERENCE])):  # as in a new process
            found = json.loads(call_kvq("doctor", "--json", *options, KVQ_ATTENTION_KERNEL=name).stdout)
        row, is_named = next(one for one in found["kernels"] if one["name"] == "wrong"), name == "wrong"
        assert row["fault"] == fault
        assert row["default"] is is_named
        assert row["reason"] == (None if is_named else f"found wrong here: {fault}")
        warning = f"KVQ_ATTENTION_KERNEL names 'wrong', which was found wrong on cpu: {fault}"
        assert ({"warning": warning} in [{one["severity"]: one["problem"]} for one in found["problems"]]) is is_named
    assert wrong_kernel.tried == 1
    done = call_kvq("doctor", KVQ_ATTENTION_KERNEL="wrong")
    assert done.returncode == 0
    assert "named by KVQ_ATTENTION_KERNEL, but found wrong here: it differs" in " ".join(done.stdout.split())
    assert "no problems found" not in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("off", "KVQ_KERNEL_TRIALS is 'off', which switches trials off; unset it to use --prove"),
        ("No", "KVQ_KERNEL_TRIALS is 'No', which switches trials off; unset it to use --prove"),
        ("perhaps", "KVQ_KERNEL_TRIALS: 'perhaps' is neither on nor off; choose one of 'on', '1'"),
    ],
)
def test_nothing_is_proven_where_trials_are_off(call_kvq, wrong_kernel, tmp_path, text, message):
    done = call_kvq("doctor", "--prove", KVQ_KERNEL_TRIALS=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert wrong_kernel.tried == 0
    assert not (tmp_path / "cache").exists()


def test_a_kernel_that_nobody_has_is_told_before_another_is_tried(call_kvq, wrong_kernel):
    done = call_kvq("doctor", "--prove", KVQ_ATTENTION_KERNEL="wrnog")
    assert done.returncode == 1
    assert "'wrnog' is not a kernel" in done.stdout
    assert wrong_kernel.tried == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prove", "--device", "cuda"), "'cuda' cannot be used here: "),
        (("--prove", "--device", "nonsense"), "'nonsense' cannot be used here: "),
        (("--prove", "--device", "cpu"), "--device cpu: only CUDA devices are proved by it"),
        (("--device", "cuda"), "--device says where to prove a kernel; give --prove too"),
    ],
)
def test_a_device_that_cannot_be_proved_is_one_line(call_kvq, options, message):
    done = call_kvq("doctor", *options, KVQ_KERNEL_TRIALS="on")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not done.stdout


@pytest.fixture
def proved(monkeypatch):
    """The record that a proof on a GPU returns, which each test may change."""
    times = {"batch": 1, "baseline": "packed queries", "baseline_us": 50.0}
    way = {"warps": 2, "stages": 1, "registers": 168, "programs_per_processor": 6}
    record = {
        "kernel": "triton", "device": "A GPU", "device_class": "cuda-sm99", "compared": 67, "wrong": [],
        "relative_error": 3e-6, "best_way": way, "speedup": 2.0,
        "ways": [
            {**times, **way, "length": 8192, "kernel_us": 25.0},
            {**times, **way, "warps": 4, "length": 8192, "kernel_us": 30.0},
            {"batch": 32, "length": 131072, "skipped": "the device has too little memory"},
        ],
    }  # fmt: skip
    monkeypatch.setattr("kvq.cli.device_proof._find_device", torch.device)
    monkeypatch.setattr("kvq.cli.device_proof._find_kernel", lambda device: REFERENCE)
    monkeypatch.setattr("kvq.benchmark.device_proof.record.prove_device", lambda *_args: record)
    return record


def test_a_proof_is_a_table_and_a_record_to_contribute(call_kvq, proved, tmp_path):
    path = tmp_path / "record.json"
    done = call_kvq("doctor", "--prove", "--device", "cuda", "--output", str(path), KVQ_KERNEL_TRIALS="on")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "right 67 of 67" in lines
    assert "1 x 8,192 50 us 25 us 2.00" in lines
    assert "32 x 131,072 the device has too little memory" in lines
    assert not any("30 us" in line for line in lines), "of the best way alone"
    assert f"written: {path}" in lines
    assert json.loads(path.read_text(encoding="utf-8")) == proved


def test_a_kernel_that_is_wrong_on_a_device_exits_with_one(call_kvq, proved, tmp_path):
    proved["wrong"] = [{"sample": "Sample(bits=3)", "error": 0.2, "tolerance": 1e-4}]
    path = str(tmp_path / "record.json")
    done = call_kvq("doctor", "--prove", "--device", "cuda", "--output", path, KVQ_KERNEL_TRIALS="on")
    assert done.returncode == 1
    assert "wrong: Sample(bits=3) differs by 2.0e-01 (at most 1e-04)" in done.stdout
    assert "right 66 of 67" in " ".join(done.stdout.split())


def test_a_record_that_cannot_be_written_is_an_error(call_kvq, proved, tmp_path):
    path = str(tmp_path / "nowhere" / "record.json")
    done = call_kvq("doctor", "--prove", "--device", "cuda", "--output", path, KVQ_KERNEL_TRIALS="on")
    assert done.returncode == 1
    assert "error: the record cannot be written: " in done.stderr
