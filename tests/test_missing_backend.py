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
from kvq.errors import MissingRequirementError
states = torch.randn(1, 1, 256, 64)
cache = KVQ()
try:
    cache.update(states, states, 0)
except MissingRequirementError as error:
    print(error)
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


@pytest.fixture
def site_without_quanto(tmp_path):
    """A directory of links to all that is installed but optimum-quanto, whose metadata and files are thus absent."""
    for entry in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for path in entry.iterdir():
            if not path.name.startswith("optimum") and not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.costly
def test_the_default_cache_says_what_is_missing_and_names_what_is_there(site_without_quanto):
    # -S: without it the interpreter adds its own site-packages again.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site_without_quanto), str(ROOT)])}
    result = subprocess.run([sys.executable, "-S", "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    message, refused, other = result.stdout.splitlines()
    assert "backend 'quanto' requires 'optimum-quanto" in message
    assert "it is not installed" in message
    assert "pip install 'optimum-quanto" in message
    assert message.endswith(f"{HINT}native")
    assert refused == "0 quanto"
    assert other == "256 True"


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
