"""The contract kit itself: right backends pass it, and every check catches a backend that is wrong in its way."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from right_backends import AFFINE, OPAQUE, RightOpaque, make_spec
from wrong_backends import WRONG

from kvq import KVQ, register_backend
from kvq.attention.hint import forget_hints
from kvq.errors import CheckNotApplicableError, ContractViolationError
from kvq.registry import BackendRegistry
from kvq.testing import CHECKS, list_checks, parametrize_contract, run_checks

pytest_plugins = ["pytester"]
NAMES = [check.__name__ for check in CHECKS]
HEAVY_PLUGIN = """
import safetensors
from right_backends import OPAQUE
from kvq.plugin_api import hookimpl

@hookimpl
def kvq_backend():
    return OPAQUE
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr("kvq.registry.registry._registry", BackendRegistry())


def install(site, name, text):
    info = site / "heavy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvq.backends]\n{name} = heavy_plugin\n")
    (site / "heavy_plugin.py").write_text(text)
    importlib.invalidate_caches()


def test_every_check_has_a_wrong_backend():
    assert set(NAMES) - {"check_light_import"} == set(WRONG)
    assert len(NAMES) == len(set(NAMES)) >= 30


@pytest.mark.parametrize("spec", [AFFINE, OPAQUE], ids=["affine", "opaque"])
def test_a_right_backend_keeps_the_contract(spec):
    register_backend(spec)
    results = list(run_checks(list_checks(spec)))
    assert [result for result in results if result.outcome == "failed"] == []
    passed = {result.check for result in results if result.outcome == "passed"}
    absent = {"check_light_import", "check_fused_scores", *(() if hasattr(KVQ, "save") else ("check_save_and_load",))}
    assert set(NAMES) - passed == absent | ({"check_codes", "check_more_bits"} if spec is OPAQUE else set())


@pytest.mark.parametrize("check", ["check_layout", "check_fused_attention"])
def test_what_the_kit_chooses_is_no_reason_to_warn(check, monkeypatch, caplog):
    """A head of 8 elements saves little, and one cache is read by the model's own attention, on purpose."""
    monkeypatch.setattr("kvq.user_warnings._told", set())
    forget_hints()
    (one,) = [one for one in list_checks("native", only=[check]) if str(one.case) == "8-per_token"]
    with warnings.catch_warnings(), caplog.at_level("WARNING", logger="kvq"):
        warnings.simplefilter("error")
        one()
    assert caplog.messages == []


def test_a_warning_of_a_backend_is_shown():
    def build(spec, options):
        warnings.warn("a plugin's own words", UserWarning, stacklevel=1)
        return OPAQUE.build(spec, options)

    spec = replace(OPAQUE, name="telling", build=build)
    register_backend(spec)
    with pytest.warns(UserWarning, match="a plugin's own words"):
        list_checks(spec, only=["check_layout"])[0]()


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, specs in WRONG.items() for place in range(len(specs))]
)
def test_a_wrong_backend_is_caught_by_its_check(name, place):
    if name == "check_save_and_load" and not hasattr(KVQ, "save"):
        pytest.skip("this version of kvq saves no cache")
    spec = WRONG[name][place]
    register_backend(spec)
    results = list(run_checks(list_checks(spec, only=[name])))
    assert any(result.outcome == "failed" and result.reason for result in results), results


@pytest.mark.costly
def test_a_module_that_imports_too_much_is_caught(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "testee", HEAVY_PLUGIN)
    (check,) = list_checks("testee", only=["check_light_import"])
    with pytest.raises(ContractViolationError, match="heavy_plugin imports safetensors before a quantizer is built"):
        check()
    install_light = HEAVY_PLUGIN.replace("import safetensors\n", "import pydantic.env_settings\n")
    (tmp_path / "heavy_plugin.py").write_text(install_light)
    check()


def test_one_that_raises_does_not_stop_the_others():
    class Raises(RightOpaque):
        def layout(self):
            raise OSError("the library is ill")

    names = ["check_spec", "check_layout", "check_options"]
    results = {one.check: one for one in run_checks(list_checks(make_spec(Raises), only=names))}
    assert results["check_layout"].outcome == "failed"
    assert "layout failed: OSError: the library is ill" in results["check_layout"].reason
    assert {results[name].outcome for name in ("check_spec", "check_options")} == {"passed"}


def test_a_check_that_does_not_exist_is_refused():
    with pytest.raises(CheckNotApplicableError, match="'check_nothing'; there are check_spec"):
        list_checks(OPAQUE, only=["check_nothing"])


def test_every_width_and_direction_is_a_case():
    counts = {name: sum(one.name == name for one in list_checks(AFFINE)) for name in NAMES}
    assert (counts["check_spec"], counts["check_more_bits"], counts["check_layout"]) == (1, 1, 2)
    assert str(list_checks(AFFINE, only=["check_layout"])[1]) == "check_layout[8-per_token]"


class TestParametrize:
    def test_expected_failures_are_strict_and_named(self):
        mark = parametrize_contract(AFFINE, expected_failures={"check_bias": "all", "check_codes[3-per_token]": "one"})
        found = {p.id: p.marks[0].kwargs for p in mark.args[1] if p.marks}
        assert found == {
            "check_bias[3-per_token]": {"reason": "all", "strict": True},
            "check_bias[8-per_token]": {"reason": "all", "strict": True},
            "check_codes[3-per_token]": {"reason": "one", "strict": True},
        }

    def test_an_expected_failure_that_names_nothing_is_refused(self):
        with pytest.raises(CheckNotApplicableError, match=r"check_codes\[9-per_token\]"):
            parametrize_contract(AFFINE, expected_failures={"check_codes[9-per_token]": "no such case"})

    def test_under_pytest(self, pytester):
        pytester.syspathinsert(Path(__file__).parent)
        (pytester.path / "test_mine.py").write_text(
            "from wrong_backends import RoundsAtRandom\n"
            "from right_backends import make_spec\n"
            "from kvq.testing import parametrize_contract\n"
            "failing = {'check_deterministic': 'rounds at random', 'check_input_untouched': 'a false claim'}\n"
            "@parametrize_contract(make_spec(RoundsAtRandom), expected_failures=failing)\n"
            "def test_contract(contract):\n"
            "    contract()\n"
        )
        chosen = "check_deterministic or check_input_untouched or check_codes or check_spec or check_non_contiguous"
        done = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "test_mine.py", "-k", chosen)
        done.assert_outcomes(failed=2, passed=1, skipped=1, deselected=27, xfailed=1)
        done.stdout.fnmatch_lines_random(
            ["*ContractViolationError: transposed states give other bits*", "*XPASS(strict)*"]
        )
