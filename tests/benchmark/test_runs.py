"""Runs: turns, what is left out and why, what is counted; no time that passes matters to any of it."""

from __future__ import annotations

import json

import pytest
import torch

from kvq.benchmark import run as run_module
from kvq.benchmark.baselines import register_packed_attention
from kvq.benchmark.contenders import BUFFER, ContenderChoice, backend_configs, list_baselines, list_own, list_peers
from kvq.benchmark.first_token import measure_first_tokens
from kvq.benchmark.kernel_record import summarize_kernel
from kvq.benchmark.measured import Measured
from kvq.benchmark.models import ModelTrials
from kvq.benchmark.picture import draw_results, series
from kvq.benchmark.report import compare, describe_results, list_failures, table_rows
from kvq.benchmark.run import BenchmarkPlan, SettingResult, run
from kvq.benchmark.setting import Setting, Shape
from kvq.benchmark.trial import LayerTrial
from kvq.errors import EvaluationError

CPU = torch.device("cpu")
SHAPE = Shape(query_heads=4, heads=2, head_dim=64, hidden_size=64, intermediate_size=64, vocabulary=128)


@pytest.fixture(autouse=True)
def _attentions():
    register_packed_attention()


def make_plan(**fields):
    peer = next(one for one in list_peers(4) if "hqq" in one.label)
    contenders = [*list_baselines(), peer, *list_own(backend_configs(["native"], 4))]
    usual = {"rounds": 4, "warmups": 1, "flushes": 2}
    return BenchmarkPlan(contenders, [Setting(SHAPE, 320, 1, torch.float32, CPU)], **{**usual, **fields})


def test_every_contender_takes_each_round_and_its_place_in_the_round_turns(monkeypatch):
    steps, original = [], LayerTrial.step
    monkeypatch.setattr(LayerTrial, "step", lambda self: steps.append(self.contender.label) or original(self))
    monkeypatch.setattr(run_module, "transient_bytes", lambda call, device: 0)
    plan = make_plan(flushes=0)
    (result,) = run(plan)
    labels = [contender.label for contender in plan.contenders]
    rounds = [steps[start : start + len(labels)] for start in range(0, len(steps), len(labels))]
    assert len(rounds) == 1 + 4
    assert all(sorted(one) == sorted(labels) for one in rounds)
    assert [one[0] for one in rounds[1:]] == labels[:4]
    assert all(len(one.steps_ms) == 4 for one in result.measured)


def test_flushes_are_measured_apart_from_steps(monkeypatch):
    """Elapsed "time" is what the store grew by, so that a step that flushes shows wherever it is counted."""

    def stored_tokens_added(call, device):
        trial = call.__self__
        layer = trial.cache.layers[0]
        if trial.contender.kind != "kvq":
            return 0.5
        before = layer.side("key").store.length
        call()
        return float(layer.side("key").store.length - before) or 0.5

    monkeypatch.setattr(run_module, "time_call", stored_tokens_added)
    (result,) = run(make_plan(rounds=150, flushes=3))
    for one in result.measured:
        assert set(one.steps_ms) == {0.5}
        if one.contender.kind == "kvq":
            assert one.flushes_ms == [64.0] * 3
            assert one.amortized_ms == pytest.approx(0.5 + 63.5 / 64)


def test_progress_adds_up_to_the_work_that_was_foretold():
    done = []
    plan = make_plan()
    list(run(plan, lambda label, work: done.append(work)))
    assert sum(done) == plan.work


def test_a_setting_that_does_not_fit_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(run_module, "find_available_bytes", lambda device: 1 << 20)
    done = []
    plan = make_plan()
    (result,) = run(plan, lambda label, work: done.append(work))
    assert result.measured == []
    assert "GiB are available" in (result.failure or "")
    assert sum(done) == plan.work


def test_what_is_too_slow_at_few_tokens_is_left_out_at_more():
    plan = make_plan(limit_s=60.0)
    peer = plan.contenders[3]
    short, long = (Setting(SHAPE, length, 1, torch.float32, CPU) for length in (1000, 8000))
    seen = [SettingResult(short, [Measured(peer, fill_s=8.0)])]
    reason = run_module.find_slowness(plan, peer, long, seen)
    assert "about 64 s" in (reason or "")
    assert run_module.find_slowness(plan, peer, short, seen) is None
    assert run_module.find_slowness(plan, plan.contenders[0], long, seen) is None


def test_a_peer_that_fails_is_told_of_and_the_rest_is_measured(monkeypatch):
    plan = make_plan()
    monkeypatch.setattr(type(plan.contenders[3].build(SHAPE.config(), 10)), "update", _raise)
    (result,) = run(plan)
    failed = [one for one in result.measured if one.failure]
    assert [one.failure for one in failed] == ["NotImplementedError: not on this machine"]
    assert all(len(one.steps_ms) == 4 for one in result.measured if one not in failed)


def _raise(*args, **kwargs):
    raise NotImplementedError("not on this machine")


def test_results_are_plain_values_and_ratios_are_those_of_their_samples(tmp_path):
    plan = make_plan()
    (facts,) = describe_results(list(run(plan)))
    json.dumps(facts, allow_nan=False)
    by_label = {one["label"]: one for one in facts["contenders"]}
    buffer = by_label[BUFFER]["samples_ms"]["step"]
    for one in facts["contenders"]:
        ratios = sorted(value / other for value, other in zip(one["samples_ms"]["step"], buffer, strict=True))
        middle = (ratios[1] + ratios[2]) / 2
        assert one["to_buffer"]["median"] == pytest.approx(middle, rel=0.05)
        assert one["held_bytes"] > 0
    fused, materialized = by_label["kvq native 4, fused"], by_label["kvq native 4, materialized"]
    assert fused["relative_error"] < 1e-4
    assert fused["kernel"] != ""
    assert (materialized["relative_error"], materialized["kernel"]) == (None, "")
    assert fused["held_bytes"] == materialized["held_bytes"] < by_label["DynamicCache"]["held_bytes"]
    assert len(table_rows(facts)) == len(plan.contenders)
    draw_results([facts], tmp_path / "speed.png", "speed")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert series([facts], BUFFER, "step_ms")[0][0] == 320


def test_nothing_measured_cannot_be_drawn(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to draw"):
        draw_results([{"contenders": []}], tmp_path / "speed.png", "speed")


def test_a_tie_is_called_one():
    ratio = {"median": 1.02, "low": 0.9, "high": 1.1, "count": 9}
    assert compare({"label": "x", "to_buffer": ratio, "is_tie": True}) == "1.02 (0.90 to 1.10), a tie"
    assert compare({"label": "x", "to_buffer": {**ratio, "low": 1.01}, "is_tie": False}) == "1.02 (1.01 to 1.10)"
    assert compare({"label": BUFFER, "to_buffer": ratio, "is_tie": True}) == "1"


def proof_facts(length, dtype, error, ratio, kernel="quick"):
    one = {"kernel": kernel, "relative_error": error, "step_ms": {"median": 1.0}, "to_buffer": {"median": ratio}}
    return {"length": length, "dtype": dtype, "contenders": [one]}


def test_a_proof_has_the_largest_error_and_the_least_speed_at_8k_and_more():
    results = [
        proof_facts(2048, "float32", 2e-5, 0.9),
        proof_facts(8192, "float32", 1e-5, 0.5),
        proof_facts(32768, "bfloat16", 4e-3, 0.8),
    ]
    proof = summarize_kernel(results, CPU)
    assert (proof["kernel"], proof["relative_error"], proof["speedup"]) == ("quick", 2e-5, 1.25)
    assert summarize_kernel(results[:1], CPU) is None
    assert summarize_kernel([proof_facts(8192, "float32", 1e-5, 0.5, kernel="eager")], CPU) is None


def test_a_whole_model_decodes_the_same_from_full_precision_in_every_form():
    contenders = list(list_baselines())
    setting = Setting(Shape(**{**vars(SHAPE), "layers": 2}), 300, 2, torch.float32, CPU)
    trials, logits = ModelTrials(), []
    for contender in contenders:
        trial = trials(contender, setting, 4)
        with torch.inference_mode():
            trial.fill()
            trial.prepare(1)
            logits.append(trial.step())
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])
    assert logits[0].std() > 1e-3


@pytest.mark.costly
def test_the_first_tokens_are_timed_in_a_fresh_process_and_here(monkeypatch):
    choice = ContenderChoice({}, peers=False)
    setting = Setting(Shape(**{**vars(SHAPE), "layers": 1}), 64, 1, torch.float32, CPU)
    monkeypatch.setattr("kvq.benchmark.contenders.list_baselines", lambda: iter(list(list_baselines())[:1]))
    facts = measure_first_tokens(setting, choice, rounds=2)
    (one,) = facts["contenders"]
    assert one["failure"] is None
    assert one["cold_ms"]["first"] > 0
    assert one["warm_ms"]["first"]["count"] == one["warm_ms"]["second"]["count"] == 2


def test_a_shape_is_read_off_a_model_and_sliding_layers_are_refused():
    assert Shape.of(SHAPE.config()) == SHAPE
    config = SHAPE.config()
    config.layer_types = ["sliding_attention"]
    with pytest.raises(EvaluationError, match="sliding_attention"):
        Shape.of(config)


def test_failures_are_listed_with_their_reason():
    facts = {"failure": None, "contenders": [{"label": "x", "failure": "too slow"}, {"label": "y", "failure": None}]}
    assert list(list_failures(facts)) == ["x: too slow"]
