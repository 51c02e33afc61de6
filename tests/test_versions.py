"""Versions: those that pyproject.toml and the constraints promise, and those that an environment is named after."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ.get("KVQ_VERSIONS") or None
"""`oldest`, `pinned` or `newest`; the Makefile says which."""
TORCH_SUFFIX = re.compile(r"\+.*")


def read_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    return {one.name: one for one in map(Requirement, texts)}


def read_pins(name):
    """Return the versions of a constraints file that count for this Python, by distribution."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pins = [one for one in map(Requirement, filter(None, lines)) if one.marker is None or one.marker.evaluate()]
    return {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}


DEPENDENCIES = read_dependencies()
PINNED, OLDEST = read_pins("constraints.txt"), read_pins("constraints-oldest.txt")


def installed(name):
    return Version(TORCH_SUFFIX.sub("", version(name)))


def lower_bound(name):
    return min(Version(one.version) for one in DEPENDENCIES[name].specifier if one.operator == ">=")


@pytest.mark.parametrize("pins", [PINNED, OLDEST], ids=["pinned", "oldest"])
def test_every_pin_of_a_dependency_is_in_its_range(pins):
    known = {name for name in DEPENDENCIES if name in pins}
    assert known >= {"torch", "transformers", "safetensors", "optimum-quanto", "hqq", "typer"}
    wrong = {name: str(pins[name]) for name in known if pins[name] not in DEPENDENCIES[name].specifier}
    assert wrong == {}


def test_the_oldest_are_the_lower_bounds():
    above = {name: str(OLDEST[name]) for name in DEPENDENCIES if name in OLDEST and OLDEST[name] != lower_bound(name)}
    # transformers 5.17 needs this safetensors; hqq has only this release of 0.2.8.
    assert set(above) <= {"safetensors", "hqq"}
    assert str(OLDEST["transformers"]) == "5.17.0"


def test_what_is_not_repeated_at_other_versions_exists():
    words = re.search(r"^ONCE \?=((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    paths = re.findall(r"(?<![\w/])tests/[\w/.*]+", words)
    assert len(paths) >= 6
    assert [path for path in paths if not list(ROOT.glob(path))] == []


@pytest.mark.skipif(ENVIRONMENT is None, reason="KVQ_VERSIONS is not set: make says which environment it runs")
def test_the_environment_has_the_versions_that_it_is_named_after():
    have = {name: installed(name) for name in DEPENDENCIES}
    if ENVIRONMENT == "newest":
        assert {name: str(have[name]) for name in have if have[name] < PINNED[name]} == {}
        assert have["transformers"] in DEPENDENCIES["transformers"].specifier
    else:
        pins = {"oldest": OLDEST, "pinned": PINNED}[ENVIRONMENT]
        assert {
            name: (str(have[name]), str(pins[name])) for name in pins if name in have and have[name] != pins[name]
        } == {}
