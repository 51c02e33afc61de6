"""Tuning from end to end on a small model: budgets, constraints, verification, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
import yaml
from random_texts import LAYERS, make_text

from kvq import KVQ, KVQCacheConfig, attach
from kvq.errors import EvaluationError
from kvq.evaluation.quality.candidates import make_candidate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.run import evaluate
from kvq.planning import plan as plan_memory
from kvq.tuning import Goal, Grid, SearchSpace, TuningPlan, group_layers, tune
from kvq.tuning.calibration import CalibrationText
from kvq.tuning.report import describe_answer, front_rows, layer_rows, list_lines
from kvq.tuning.tuned_file import describe_point, describe_tuned
from kvq.tuning.tuner import count_bytes


class Interrupted:
    """A watcher that presses Ctrl-C after some units of work."""

    def __init__(self, after):
        self.left = after

    def begin(self, label, total, unit):
        pass

    def advance(self, label, done=1):
        self.left -= done
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def make_plan(model, text, base):
    def make(goal, *, bits=(2, 4, 8), most_pairs=None, **options):
        layers = {name: options.pop(name) for name in ("together", "keep_first", "keep_last") if name in options}
        settings = tuple(Grid(bits=bits).settings())
        space = SearchSpace(settings, settings, *group_layers(range(LAYERS), **layers), most_pairs)
        sizes = {"prefill": 100, "step": 32, "tries": 0, "text": text, "base": base, **options}
        return TuningPlan(model=model, held_out=make_text(2), space=space, goal=goal, **sizes)

    return make


@pytest.fixture(scope="module")
def budget():
    """A goal between the smallest and the largest candidates of the model."""
    return Goal(1000, bits=7.5)


@pytest.fixture(scope="module")
def answer(make_plan, budget):
    return tune(make_plan(budget, tries=7))


def held_bytes(model, config, context):
    cache = KVQ(config, model=model)
    with torch.no_grad():
        model(torch.randint(199, (1, context)), past_key_values=cache)
    return cache.memory().total_bytes


def test_the_answer_keeps_to_the_budget_in_bytes_that_a_cache_holds(answer, model):
    # 1,000 tokens are more than the model was made for, which random weights do not mind.
    found = held_bytes(model, answer.config, 1000)
    assert found == answer.tuned.num_bytes == answer.memory.total_bytes
    plain = LAYERS * 2 * 2 * 16 * 1000 * 4
    assert 32 * found / plain <= 7.5
    assert answer.tuned.bits == pytest.approx(32 * found / plain)


def test_no_configuration_of_the_space_has_a_smaller_sum_within_the_budget(answer):
    costs = {(one.probe.layers[0], one.probe.side, one.probe.setting.nbits): one.kl for one in answer.sensitivities}
    sizes = count_bytes(answer.plan)
    most = answer.plan.goal.most_bytes(sizes.layer_bytes)
    pairs = answer.plan.space.pairs
    own = [[(sizes.layer_bytes.measure(index, pair), pair) for pair in pairs] for index in range(LAYERS)]
    best = min(
        math.fsum(
            costs[index, "key", pair.key.nbits] + costs[index, "value", pair.value.nbits]
            for index, (_, pair) in enumerate(some)
        )
        for some in product(*own)
        if sum(size for size, _ in some) <= most
    )
    unrefined = tune(dataclasses.replace(answer.plan, tries=0))
    assert unrefined.tuned.predicted == pytest.approx(best)


def test_the_answer_is_better_than_the_best_uniform_one_on_the_held_out_text(answer):
    tuned, *others = answer.records
    assert all(tuned.kl.mean < 0.8 * uniform.kl.mean for uniform in others)
    assert answer.uniform[1].kl.mean == min(uniform.kl.mean for uniform in others)
    for point in answer.uniforms:
        assert point.bits <= 7.5
        assert len(set(point.assignment.values())) == 1


def test_the_figures_of_the_held_out_text_are_those_of_an_evaluation(answer, model):
    plan = EvaluationPlan(model, make_text(2), [make_candidate("tuned", answer.config)], None, 100, 32, 2)
    assert evaluate(plan)[0].kl == answer.records[0].kl


def test_the_sum_of_single_effects_predicts_the_joint_one(answer):
    assert answer.tuned.predicted == pytest.approx(answer.before, rel=0.35)
    assert answer.tuned.measured <= answer.before
    sizes = [point.num_bytes for point in answer.front]
    assert sizes == sorted(sizes)
    assert answer.front[0].measured > answer.front[-1].measured


def test_the_file_loads_everywhere_and_says_what_was_measured(answer, model, tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(describe_tuned(answer, "a model", "kvq tune --budget 7.5"))
    assert KVQCacheConfig.from_file(path) == answer.config
    text = path.read_text()
    for said in ("kvq tune --budget 7.5", "noise 1 (2 x 164 tokens)", "noise 2 (2 x 164 tokens)", "uniform"):
        assert said in text
    assert f"{answer.tuned.measured:.2e}" in text
    assert yaml.safe_load(text)["rotation_k"] == "hadamard"
    assert plan_memory(model.config, path, context=1000, dtype=torch.float32).total_bytes == answer.tuned.num_bytes
    with attach(model, str(path)):
        output = model.generate(torch.randint(3, 199, (1, 90)), max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 93)
    point = answer.front[2]
    (tmp_path / "point.yaml").write_text(describe_point(point, answer, "a model", "kvq tune"))
    assert KVQCacheConfig.from_file(tmp_path / "point.yaml") == point.config


def test_tables_and_record_have_every_layer_and_setting(answer):
    assert len(layer_rows(answer)) == LAYERS
    assert sum(row[-1] == "tuned" for row in front_rows(answer)) == 1
    assert any(line.startswith("verified on noise 2") for line in list_lines(answer))
    found = describe_answer(answer, "a model", "kvq tune")
    assert found["records"][0]["label"] == "tuned"
    assert all(one["label"].startswith("uniform K") for one in found["records"][1:])
    assert len(found["tuning"]["sensitivities"]) == LAYERS * 2 * 3
    assert set(found["tuning"]["weight_norms"]) == {"0", "1", "2", "3"}
    norm = answer.plan.model.model.layers[1].self_attn.v_proj.weight.detach().float().square().sum().sqrt()
    assert found["tuning"]["weight_norms"]["1"][1] == pytest.approx(float(norm))


def test_a_divergence_is_reached_as_measured_in_fewer_bytes_than_the_next_larger_one(make_plan):
    loose, tight = (tune(make_plan(Goal(1000, max_kl=bound))) for bound in (0.3, 0.03))
    assert loose.tuned.measured <= 0.3
    assert tight.tuned.measured <= 0.03
    assert loose.tuned.num_bytes < tight.tuned.num_bytes


def test_memory_holds_with_the_room_that_generating_opens(make_plan):
    found = tune(make_plan(Goal(1000, memory_bytes=300_000)))
    assert found.memory.total_bytes < found.memory.peak_bytes == found.tuned.num_bytes <= 300_000


def test_constraints_on_layers_are_kept(make_plan):
    found = tune(make_plan(Goal(1000, bits=20), keep_first=1, keep_last=1, together=2))
    assert [found.config.for_layer(index).full_precision for index in range(LAYERS)] == [True, False, False, True]
    assert found.tuned.assignment[1] == found.tuned.assignment[2]
    assert found.tuned.num_bytes == found.memory.total_bytes
    few = tune(make_plan(Goal(1000, bits=7.5), most_pairs=2, tries=4))
    assert len(set(few.tuned.assignment.values())) <= 2


def test_a_run_that_was_stopped_goes_on_where_it_was(make_plan, answer, tmp_path, monkeypatch):
    measured = []
    whole = CalibrationText._measure
    monkeypatch.setattr(CalibrationText, "_measure", lambda self, some: measured.extend(some) or whole(self, some))
    plan = make_plan(Goal(1000, bits=7.5), tries=7)
    with pytest.raises(KeyboardInterrupt):
        tune(plan, parts=tmp_path, watcher=Interrupted(10))
    done = len(measured)
    assert 0 < done < LAYERS * 2 * 3
    measured.clear()
    found = tune(plan, parts=tmp_path)
    assert found.config == answer.config
    assert found.tuned == answer.tuned
    measured.clear()
    tune(plan, parts=tmp_path)
    assert measured == []
    tune(dataclasses.replace(plan, step=16), parts=tmp_path)
    assert measured


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(1000, bits=1.0), r"--budget 1 is below the smallest candidate, [\d.]+ bits, at --context 1000"),
        (Goal(1000, memory_bytes=9000), "--memory 8.8 KiB is below the smallest candidate"),
        (Goal(1000, max_kl=1e-12), "is not reached by any of the candidates"),
    ],
)
def test_a_goal_out_of_reach_is_refused(make_plan, goal, said):
    with pytest.raises(EvaluationError, match=said):
        tune(make_plan(goal))


@pytest.mark.parametrize("given", [{}, {"bits": 3.0, "max_kl": 0.1}, {"bits": 0.0}, {"bits": math.inf}])
def test_exactly_one_goal_is_needed(given):
    with pytest.raises(EvaluationError, match="goal"):
        Goal(1000, **given)


def test_a_text_in_which_nothing_is_quantized_is_refused(make_plan):
    with pytest.raises(EvaluationError, match="nothing was quantized in 60 tokens"):
        tune(make_plan(Goal(1000, bits=7.5), text=make_text(3, length=60), prefill=20))


def test_warnings_name_a_short_text_and_a_window_without_sinks(make_plan, base):
    found = tune(make_plan(Goal(1000, bits=7.5), base=base.replace(sink_length=0)))
    assert any("only 128 tokens" in warning for warning in found.warnings)
    assert any("sink_length: 0" in warning for warning in found.warnings)


def test_backends_compete(make_plan):
    plan = make_plan(Goal(1000, bits=7.5))
    settings = tuple(Grid(backends=("quanto", "native"), bits=(3, 4)).settings())
    assert [one.backend for one in settings] == ["quanto", "native", "native"]
    plan = dataclasses.replace(plan, space=dataclasses.replace(plan.space, keys=settings, values=settings))
    sizes = count_bytes(plan)
    found = tune(dataclasses.replace(plan, goal=Goal(1000, bits=1.05 * sizes.layer_bytes.bits(sizes.least_bytes))))
    used = {side.backend for pair in found.tuned.assignment.values() for side in (pair.key, pair.value)}
    assert "native" in used  # it alone has 3 bits
    assert found.tuned.num_bytes == found.memory.total_bytes


def test_a_backend_without_any_candidate_is_refused():
    with pytest.raises(EvaluationError, match=r"backend 'quanto' has none of the candidates: it takes 2, 4, 8 bits"):
        Grid(backends=("native", "quanto"), bits=(3, 5)).settings()
