"""Grids of configurations, with what a backend lacks left out and what fails told."""

from __future__ import annotations

import pytest

from kvq import KVQCacheConfig
from kvq.errors import EvaluationError
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.run import evaluate
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities
from kvq.registry import get_registry
from kvq.tuning import Grid
from kvq.tuning.sweep import SweepGrid


def make_grid(bits_v=(2,), windows=(16,), **sides):
    return SweepGrid(Grid(**sides), bits_v, windows, KVQCacheConfig())


def test_every_combination_is_a_cache_with_a_name_of_what_differs():
    candidates, left_out = make_grid(
        backends=("native", "quanto"), bits=(4, 2), bits_v=(4, 2), windows=(16, 32), group_sizes=(32, 64)
    ).candidates()
    assert len(candidates) == 2 * 2 * 2 * 2 * 2
    assert left_out == []
    found = {one.label: one.settings for one in candidates}["quanto K4V2 g32 w16"]
    assert (found["backend"], found["nbits_k"], found["nbits_v"]) == ("quanto", 4, 2)
    assert (found["q_group_size"], found["residual_length"], found["layers"]) == (32, 16, {})


def test_what_a_backend_lacks_is_left_out_and_named():
    candidates, left_out = make_grid(
        backends=("quanto",), bits=(4, 3), bits_v=(2, 5), axes=("per_channel", "per_token"), balances=("rms",)
    ).candidates()
    assert [one.label for one in candidates] == ["quanto K4V2 channel"]
    assert left_out[0] == "quanto has no 3 bits"
    assert any("nbits_v: 5 is not supported" in line or "5" in line for line in left_out[1:])
    assert any("'rms' does not fit 'per_token'" in line for line in left_out)


def test_an_empty_grid_is_refused():
    with pytest.raises(EvaluationError, match="the grid has no configuration: quanto: "):
        make_grid(backends=("quanto",), bits=(4,), bits_v=(3,)).candidates()


def test_a_cache_that_fails_does_not_end_the_run(model, text, monkeypatch):
    def refuse(spec, options):
        raise RuntimeError("out of order")

    broken = BackendSpec("broken", API_VERSION, Capabilities(nbits=(4,)), build=refuse)
    registry = get_registry()
    own = registry.get_backend
    monkeypatch.setattr(type(registry), "get_backend", lambda self, name: broken if name == "broken" else own(name))
    candidates, _ = make_grid(backends=("native", "broken"), bits=(4,), bits_v=(4,)).candidates()
    plan = EvaluationPlan(model, text, candidates, None, prefill=100, step=32, batch_size=2)
    fine, failed = evaluate(plan)
    assert fine.failure is None
    assert fine.kl.mean > 0
    assert "out of order" in failed.failure
