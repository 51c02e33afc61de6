"""`kvq doctor`."""

from __future__ import annotations

import json
import os

from kvq import __version__


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
    assert found["environment"] == {"KVQ_PLUGINS": "toy,faulty,quantoo", "KVQ_BLOCK_PLUGINS": ""}
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
