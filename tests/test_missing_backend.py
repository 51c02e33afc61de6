"""What happens where the library of the default backend is absent or broken: it is said, and nothing is swapped."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kvq import KVQ
from kvq.errors import BackendConflictError, BrokenBackendError, MissingRequirementError
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities
from kvq.registry import BackendRegistry
from kvq.registry.discovery import ENTRY_POINT_GROUP, OWN_DISTRIBUTION

ROOT = Path(__file__).parents[1]
HINT = "; backends that need nothing more: "

PROGRAM = """
import torch
from kvq import KVQ
from kvq.errors import BackendError
states = torch.randn(1, 1, 256, 64)
for fields in ({}, {"backend": "hqq"}):
    cache = KVQ(**fields)
    try:
        cache.update(states, states, 0)
    except BackendError as error:
        print(type(error).__name__, error)
    print(cache.get_seq_length(), cache.config.backend)
other = KVQ(backend="native")
other.update(states, states, 0)
print(other.get_seq_length(), other.memory().compression > 1)
"""


def make_spec(name, **fields):
    fields = {"capabilities": Capabilities(nbits=(4,)), "build": lambda _spec, _options: None, **fields}
    return BackendSpec(name=name, api_version=API_VERSION, **fields)


class Point:
    """An entry point that loads a ready plugin, or fails as an import would."""

    group = ENTRY_POINT_GROUP

    def __init__(self, name, outcome, distribution=OWN_DISTRIBUTION):
        self.name, self.outcome, self.value = name, outcome, f"module_of_{name}"
        self.dist = type("Dist", (), {"name": distribution, "version": "1.0"})()
        self.was_loaded = False

    def load(self):
        self.was_loaded = True
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return make_plugin(self.outcome)


def make_plugin(spec):
    from kvq.plugin_api import hookimpl

    class Plugin:
        @staticmethod
        @hookimpl
        def kvq_backend():
            return spec

    return Plugin


LIBRARIES = {"quanto": "optimum", "hqq": "hqq"}
"""Backends, and how the names of what their vendors install begin."""
FAULTS = {
    "ImportError": "from torch import a_name_that_a_new_torch_lacks",
    "AttributeError": "import torch; torch.library.a_name_that_a_new_torch_lacks",
}


@pytest.fixture
def run_program(tmp_path):
    """Return a function that runs the program with all that is installed but what begins with some names."""

    def run(absent, *first):
        site = tmp_path / "site"
        site.mkdir()
        for entry in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
            for path in entry.iterdir():
                if not path.name.startswith(tuple(absent)) and not (site / path.name).exists():
                    (site / path.name).symlink_to(path)
        # -S: without it the interpreter adds its own site-packages again.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first, ROOT, site]))}
        done = subprocess.run([sys.executable, "-S", "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.costly
@pytest.mark.case("optimum-quanto and hqq are both uninstalled", "the error says what to install, and names native")
def test_the_default_cache_says_what_is_missing_and_names_what_is_there(run_program):
    message, refused, other_message, other_refused, native = run_program(LIBRARIES.values())
    assert message.startswith("MissingRequirementError backend 'quanto' requires 'optimum-quanto")
    assert "it is not installed" in message
    assert "pip install 'optimum-quanto" in message
    assert message.endswith(f"{HINT}native")
    assert other_message.startswith("MissingRequirementError backend 'hqq' requires 'hqq")
    assert other_message.endswith(f"{HINT}native")
    assert (refused, other_refused, native) == ("0 quanto", "0 hqq", "256 True")


@pytest.mark.costly
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.case("A new torch breaks optimum-quanto", "the error has the reason, and names native; hqq works")
def test_a_library_that_a_new_torch_breaks_is_named_with_what_still_works(run_program, tmp_path, fault):
    (tmp_path / "broken" / "optimum" / "quanto").mkdir(parents=True)
    (tmp_path / "broken" / "optimum" / "quanto" / "__init__.py").write_text(FAULTS[fault])
    message, refused, other, native = run_program([], tmp_path / "broken")
    kind = "BrokenBackendError" if fault == "ImportError" else "BackendFailedError"
    assert message.startswith(f"{kind} backend 'quanto'")
    assert "a_name_that_a_new_torch_lacks" in message
    assert message.endswith(f"{HINT}native")
    assert (refused, other, native) == ("0 quanto", "256 hqq", "256 True")


@pytest.mark.costly
@pytest.mark.case(
    "A new torch breaks hqq, which transformers imports where it is installed", "`kvq doctor` names hqq and the remedy"
)
def test_doctor_names_the_library_that_breaks_transformers(tmp_path):
    broken = tmp_path / "site-packages"
    (broken / "hqq").mkdir(parents=True)
    (broken / "hqq" / "__init__.py").write_text(FAULTS["AttributeError"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [broken, ROOT]))}
    command = [sys.executable, "-m", "kvq", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "kvq.cache cannot be imported" in line]
    assert "AttributeError: module 'torch.library' has no attribute 'a_name_that_a_new_torch_lacks'" in line
    assert "update hqq, in whose code that is raised, or uninstall it if you can do without" in done.stdout


def test_a_refused_update_swaps_nothing(monkeypatch):
    found = metadata.version
    hidden = {"optimum-quanto"}

    def version(name):
        if name in hidden:
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("kvq.installed.metadata.version", version)
    states = torch.randn(1, 1, 256, 64)
    cache = KVQ()
    for _ in range(2):
        with pytest.raises(MissingRequirementError, match=f"{HINT}.*native"):
            cache.update(states, states, 0)
        assert cache.get_seq_length() == 0
    hidden.clear()
    cache.update(states, states, 0)
    assert type(cache.layers[0].side("key").codec.quantizer).__name__ == "QuantoQuantizer"


class TestHint:
    def test_of_a_missing_requirement(self):
        points = [
            Point("plain", make_spec("plain")),
            Point("basic", make_spec("basic")),
            Point("needy", make_spec("needy", requires=("site-absent",))),
        ]
        registry = BackendRegistry(lambda: points, {})
        with pytest.raises(MissingRequirementError) as caught:
            registry.check_requirements(registry.get_backend("needy"))
        assert str(caught.value).endswith(f"(`kvq backends` lists them){HINT}basic, plain")

    def test_of_a_broken_backend_each_time(self):
        points = [Point("plain", make_spec("plain")), Point("bad", OSError("no library"))]
        registry = BackendRegistry(lambda: points, {})
        for _ in range(2):
            with pytest.raises(BrokenBackendError) as caught:
                registry.get_backend("bad")
            assert str(caught.value).endswith(f"repair or uninstall that distribution{HINT}plain")

    def test_the_list_of_backends_does_not_repeat_it(self):
        points = [
            Point("plain", make_spec("plain")),
            Point("bad", OSError("no library")),
            Point("needy", make_spec("needy", requires=("site-absent",))),
        ]
        infos = {info.name: info for info in BackendRegistry(lambda: points, {}).available_backends(load=True)}
        assert [infos[name].state for name in ("plain", "bad", "needy")] == ["ready", "broken", "missing requirement"]
        assert not any(HINT in info.reason for info in infos.values())

    def test_nothing_to_name_is_nothing_said(self):
        points = [Point("bad", OSError("no library")), Point("needy", make_spec("needy", requires=("site-absent",)))]
        registry = BackendRegistry(lambda: points, {})
        with pytest.raises(BrokenBackendError, match=r"uninstall that distribution$"):
            registry.get_backend("bad")

    def test_what_cannot_be_had_is_not_named(self):
        points = [
            Point("blocked", make_spec("blocked")),
            Point("bad", OSError("no library")),
            Point("worse", SystemExit("bye")),
            Point("plain", make_spec("plain")),
        ]
        registry = BackendRegistry(lambda: points, {"KVQ_BLOCK_PLUGINS": "blocked"})
        with pytest.raises(BrokenBackendError, match=f"{HINT}plain$"):
            registry.get_backend("bad")

    def test_foreign_plugins_are_not_imported_for_it_but_named_once_known(self):
        foreign = Point("foreign", make_spec("foreign"), distribution="someone-else")
        registry = BackendRegistry(lambda: [foreign, Point("bad", OSError("no library"))], {})
        with pytest.raises(BrokenBackendError, match=r"uninstall that distribution$"):
            registry.get_backend("bad")
        assert not foreign.was_loaded
        registry.get_backend("foreign")
        registry.register_backend(make_spec("own"))
        with pytest.raises(BrokenBackendError, match=f"{HINT}foreign, own$"):
            registry.get_backend("bad")

    def test_another_kind_of_error_has_none(self):
        points = [Point("twice", make_spec("twice"), "a"), Point("twice", make_spec("twice"), "b")]
        registry = BackendRegistry(lambda: [*points, Point("plain", make_spec("plain"))], {})
        with pytest.raises(BackendConflictError) as caught:
            registry.get_backend("twice")
        assert HINT not in str(caught.value)
