"""`kvq new-backend`: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvq.cli.templates import FILES, render, write_distribution
from kvq.plugin_api import AffineQuantizer, Quantizer
from kvq.registry.spec_validation import check_spec
from kvq.testing import list_checks, run_checks

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "plugins" / "kvq-template"


def test_the_plugin_of_the_tree_is_what_it_writes():
    """If this fails: python scripts/update_template_plugin.py."""
    skipped = {"__pycache__", ".pytest_cache"}
    found = {
        str(path.relative_to(TEMPLATE)): path.read_text(encoding="utf-8")
        for path in TEMPLATE.rglob("*")
        if path.is_file() and not skipped & set(path.parts)
    }
    assert found == render("template", general=False)


@pytest.fixture
def import_plugin(tmp_path, monkeypatch):
    """Return a function that writes a distribution and imports its plugin."""

    def make(name, *, general):
        write_distribution(tmp_path / "written", name, general=general)
        monkeypatch.syspath_prepend(str(tmp_path / "written" / "src"))
        return importlib.import_module(f"kvq_{name.replace('-', '_')}.plugin")

    return make


@pytest.mark.parametrize(("general", "kind"), [(False, AffineQuantizer), (True, Quantizer)])
@pytest.mark.parametrize("name", ["mine", "my-own_2nd"])
def test_it_is_a_backend_of_that_name(import_plugin, tmp_path, name, general, kind):
    name = f"{name}-{'general' if general else 'affine'}"  # modules stay imported
    plugin = import_plugin(name, general=general)
    spec = check_spec(plugin.kvq_backend(), name, "the plugin written")
    names = [f"check_{one}" for one in ("options", "requirements", "defaults", "layout", "accuracy", "lost_numbers")]
    results = [
        one for one in run_checks(list_checks(spec, only=names)) if one.case.startswith("4-") or "s" in one.check
    ]
    assert {one.outcome for one in results} == {"passed"}, results
    written = yaml.safe_load((tmp_path / "written" / f"{name}.yaml").read_text())
    assert written == {"backend": name, "nbits_k": 4, "nbits_v": 4}


@pytest.mark.parametrize("general", [False, True])
def test_nothing_is_left_to_fill_in_and_nothing_leads_out(general):
    for name in ("mine", "a-very-long-name-of-a-backend"):
        for path, text in render(name, general=general).items():
            assert "$" not in path
            assert "${" not in text
            assert "](" not in text, "no link that is right only in kvq's own tree"
            assert "template" not in text.lower()
    assert len(render("mine", general=general)) == len(FILES) == 8


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("general", [False, True])
def test_it_keeps_our_own_rules(tmp_path, general):
    (tmp_path / "plugins").mkdir()
    write_distribution(tmp_path / "plugins" / "kvq-mine", "mine", general=general)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Imports of kvq come last in the tree, as those of a package that lies there; the plugin of the tree shows that.
    for command in (["check", "--ignore", "I001"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["native"], "the name 'native' belongs to kvq; choose another one"),
        (["Mine"], "'Mine' is not a name; it begins with a letter"),
        (["../mine"], "'../mine' is not a name"),
        (["2bits"], "'2bits' is not a name"),
        (["mine-"], "'mine-' is not a name"),
        ([""], "'' is not a name"),
        (["off"], "the name 'off' means False in YAML"),
        (["mine", "--folder", "nowhere"], "--folder 'nowhere' is not a folder; make it first"),
        (["there"], "'kvq-there' is there already; move it"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(call_kvq, tmp_path, args, message):
    (tmp_path / "kvq-there").mkdir()
    done = call_kvq("new-backend", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kvq-there"]
    assert not list((tmp_path / "kvq-there").iterdir())


def test_the_name_of_an_installed_plugin_is_refused(call_kvq, toy_path):
    done = call_kvq("new-backend", "toy", PYTHONPATH=toy_path)
    assert done.returncode == 2
    assert "the name 'toy' belongs to toybox" in done.stderr


def test_it_says_what_was_written_and_what_is_next(call_kvq, tmp_path):
    (tmp_path / "own").mkdir()
    done = call_kvq("new-backend", "mine", "--general", "--folder", "own")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert {tmp_path / line for line in lines[:8]} == {path for path in (tmp_path / "own").rglob("*") if path.is_file()}
    assert "next: pip install -e own/kvq-mine; kvq check mine" in lines[-2]
    assert (tmp_path / lines[-1].split()[-1]).is_file()
