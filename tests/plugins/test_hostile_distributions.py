"""Hostile plugins as installed distributions, all in one environment: none disturbs another, each shows its reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from installed_plugins import environment_with

SPEC = """
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, hookimpl

@hookimpl
def kvq_backend():
    return BackendSpec(
        name={name!r},
        api_version={version},
        capabilities=Capabilities(nbits=(4,)),
        build=lambda spec, options: None,
        requires={requires!r},
        summary="a guest",
    )
"""
HOOK = "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend():\n    {body}\n"


def spec(name, version="API_VERSION", requires=()):
    return SPEC.format(name=name, version=version, requires=tuple(requires))


HOSTILE = {
    "unimportable": ("import a_library_that_is_not_there", "broken", "No module named 'a_library_that_is_not_there'"),
    "needy": (spec("needy", requires=["a-distribution-that-is-not-there>=3"]), "missing requirement", "not installed"),
    "untyped": (HOOK.format(body="return {'name': 'untyped'}"), "broken", "a BackendSpec is needed, got dict"),
    "ancient": (spec("ancient", version="0"), "broken", "written for plugin API 0, this kvq has 1"),
    "misnamed": (spec("other_name"), "broken", "it calls itself 'other_name'"),
    "raising": (HOOK.format(body="raise RuntimeError('no GPU here')"), "broken", "RuntimeError: no GPU here"),
    "leaving": (HOOK.format(body="import sys; sys.exit('bye')"), "broken", "SystemExit: bye"),
    "killing": ("import sys\nsys.exit(3)", "broken", "SystemExit: 3"),
    "slow": ("import time\ntime.sleep(0.2)\nprint('slow was imported')\n" + spec("slow"), "ready", ""),
    "twin": (spec("twin"), "conflict", "guest-twin 1.0 (guest_twin) and guest-twin-again 1.0 (guest_twin_again)"),
    "native": ("raise SystemExit('mine now')", "ready", "reserved; ignored: guest-native 1.0"),
}
USE_OTHERS = """
import sys
import torch
from kvq import KVQ, available_backends
names = {info.name for info in available_backends()}
states = torch.randn(1, 1, 256, 64)
for name in ("native", "template"):
    cache = KVQ(backend=name, nbits_k=4, nbits_v=4)
    cache.update(states, states, 0)
    print(name, cache.memory().compression > 1)
print(sorted(module for module in sys.modules if module.startswith("guest_")))
print(len(names))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from installed_plugins import PLUGINS, install

    folder = tmp_path_factory.mktemp("site")
    install(PLUGINS / "kvq-template", folder)
    for name, (source, _, _) in HOSTILE.items():
        add_distribution(folder, f"guest-{name}", name, source)
    add_distribution(folder, "guest-twin-again", "twin", spec("twin"))
    return folder


def add_distribution(folder, title, name, source):
    module = title.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvq.backends]\n{name} = {module}\n")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture(scope="module")
def listed(site):
    done = run(site, "-m", "kvq", "backends", "--json")
    assert done.returncode == 0, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["backends"]}


def run(site, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment_with(site), cwd=site, check=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_each_shows_with_its_reason(listed, name):
    _, state, reason = HOSTILE[name]
    assert listed[name]["state"] == state
    assert reason in listed[name]["reason"]
    owner = "kvq" if name == "native" else f"guest-{name}"
    assert listed[name]["origin"].startswith(owner)


def test_the_others_are_there_as_if_nothing_were(listed):
    assert set(listed) >= {*HOSTILE, "template", "quanto", "hqq"}
    assert {listed[name]["state"] for name in ("template", "native", "slow")} == {"ready"}


@pytest.mark.costly
def test_using_another_backend_imports_none_of_them(site):
    done = run(site, "-c", USE_OTHERS)
    assert done.returncode == 0, done.stderr
    native, template, modules, count = done.stdout.splitlines()
    assert (native, template, modules) == ("native True", "template True", "[]")
    assert int(count) >= len(HOSTILE) + 1


@pytest.mark.costly
def test_naming_one_ends_with_a_line_and_no_traceback(site):
    done = run(site, "-m", "kvq", "check", "leaving")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "backend 'leaving' from guest-leaving 1.0" in done.stderr
    assert "SystemExit: bye" in done.stderr
    assert "Traceback" not in done.stderr
