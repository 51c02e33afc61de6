"""`kvq backends`."""

from __future__ import annotations

import json

import pytest

from kvq import __version__

LIST = """
import sys
sys.argv = ["kvq", "backends"]
from kvq.cli import main
try:
    main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_the_list_shows_all_without_a_vendors_library(run, toy_path):
    done = run("-c", LIST, PYTHONPATH=toy_path, COLUMNS=80)
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert {"name", "faulty", "hqq", "needy", "quanto", "toy"} <= set(lines)
    assert "RuntimeError: the plugin is ill" in lines["faulty"]
    assert "missing requirement" in lines["needy"]
    assert "no-such-distribution>=3" in lines["needy"]
    assert "ready" in lines["quanto"]
    assert f"kvq {__version__}" in lines["quanto"]
    assert "toybox 1.2" in lines["toy"]
    assert lines["toy"].endswith("and ends here")
    assert "\x1b" not in done.stdout
    imported = done.stderr.split("imported:")[1].split()
    assert "toy_plugin" in imported
    assert not {"optimum", "hqq", "transformers"} & set(imported)


def test_the_list_as_json(call_kvq, toy_path):
    done = call_kvq("backends", "--json", PYTHONPATH=toy_path, KVQ_BLOCK_PLUGINS="hqq")
    assert done.returncode == 0
    assert "noise of a plugin" in done.stderr
    listed = {one["name"]: one for one in json.loads(done.stdout)["backends"]}
    states = {"faulty": "broken", "hqq": "blocked", "needy": "missing requirement", "quanto": "ready", "toy": "ready"}
    assert {name: listed[name]["state"] for name in states} == states
    assert "KVQ_BLOCK_PLUGINS" in listed["hqq"]["reason"]
    assert listed["hqq"]["nbits"] is None
    assert listed["quanto"]["nbits"] == [2, 4, 8]
    assert listed["quanto"]["granularities"] == ["per_token", "per_channel"]
    assert (listed["quanto"]["origin"], listed["quanto"]["version"]) == ("kvq", __version__)


def test_one_backend_as_json(call_kvq, toy_path):
    done = call_kvq("backends", "toy", "--json", PYTHONPATH=toy_path)
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["axis_names"] == {"7": "per_token"}
    assert [(one["name"], one["required"], one["met"]) for one in facts["requirements"]] == [
        ("packaging", ">=20", True)
    ]
    option = {"name": "strength", "type": "int", "required": False, "default": 3}
    assert facts["options"] == [{**option, "description": "how strong [bold]it[/bold] is"}]
    figures = {(one["nbits"], one["granularity"]): one for one in facts["effective_bits"]}
    assert len(figures) == 4
    # 64 codes, a scale of 16 bits and a mid of 16 (32 above 4 bits a code) for 64 elements; one byte for each block:
    # 32 tokens of per-token groups, 64 tokens of per-channel ones, 128 elements in each. Where groups are per channel,
    # each token has a factor of one byte.
    assert figures[4, "per_token"]["key"] == 4 + 2 * 16 / 64 + 8 / (32 * 128)
    assert figures[4, "per_channel"]["value"] == 4 + 2 * 16 / 64 + 8 / (64 * 128) + 8 / 128
    assert figures[8, "per_channel"]["key"] == 8 + (16 + 32) / 64 + 8 / (64 * 128) + 8 / 128
    kernels = {"compiled": "codes", "triton": "codes", "blockwise": "decoded", "eager": "codes"}
    assert facts["readers"] == [
        {"granularity": word, "kernels": kernels, "reasons": {}} for word in ("per_token", "per_channel")
    ]


def test_one_backend_for_people(call_kvq, toy_path):
    done = call_kvq("backends", "toy", PYTHONPATH=toy_path)
    assert done.returncode == 0
    fields = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "toybox 1.2" in fields["origin"]
    assert "https://toy.example" in fields["url"]
    assert fields["strength"].split() == ["strength", "int", "3", "how", "strong", "[bold]it[/bold]", "is"]
    assert ["4", "per_token", "4.502", "4.502"] in [line.split() for line in done.stdout.splitlines()]
    assert ["per_channel", "codes", "codes", "decoded", "codes"] in [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("qanto", 2, "error: backend 'qanto' is unknown; did you mean 'quanto'?"),
        ("needy", 1, "no-such-distribution>=3: not installed, not met"),
    ],
)
def test_a_backend_that_cannot_be_used(call_kvq, toy_path, name, code, message):
    done = call_kvq("backends", name, PYTHONPATH=toy_path)
    assert done.returncode == code
    assert message in (done.stderr if code == 2 else done.stdout)
    assert (done.stdout == "") == (code == 2)
    assert ("no effective bits" in done.stdout) == (code == 1)
    assert "Traceback" not in done.stderr
