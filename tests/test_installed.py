"""Installed versions against requirements: one answer, whoever asks."""

from __future__ import annotations

from importlib import metadata

import pytest

from kvq.cli.requirement_state import describe_requirements
from kvq.errors import MissingRequirementError
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities
from kvq.registry import get_registry

ABSENT = object()


@pytest.mark.parametrize(
    ("installed", "requirement", "is_met"),
    [
        ("1.5", "thing>=1.2", True),
        ("1.1", "thing>=1.2", False),
        ("2.0rc1", "thing>=1.2", True),
        ("1.2+cu130", "thing==1.2", True),
        ("unknown", "thing>=1.2", False),
        ("unknown", "thing", True),
        ("v.next", "thing!=1", False),
        ("", "thing", False),
        (None, "thing", False),
        (ABSENT, "thing", False),
        (ABSENT, "thing; python_version < '3'", True),
        (ABSENT, "thing; extra == 'more'", True),
    ],
)
@pytest.mark.case(
    "a requirement of a backend against versions that cannot be parsed, that are empty or not there",
    "`kvq doctor`, `kvq backends` and the registry give the same answer",
)
def test_the_registry_and_the_doctor_agree(monkeypatch, installed, requirement, is_met):
    def version(name):
        if installed is ABSENT:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("kvq.installed.metadata.version", version)
    spec = BackendSpec("needy", API_VERSION, Capabilities(nbits=(4,)), build=lambda *_: None, requires=(requirement,))
    assert all(one["met"] for one in describe_requirements(spec.requires)) is is_met
    if is_met:
        get_registry().check_requirements(spec)
    else:
        with pytest.raises(MissingRequirementError, match="'needy' requires 'thing"):
            get_registry().check_requirements(spec)
