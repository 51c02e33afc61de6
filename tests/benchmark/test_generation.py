"""Several tokens at once and many steps in a row: what stays in the caches, what is counted, what is left out."""

from __future__ import annotations

import pytest
import torch

from kvq.benchmark import generation
from kvq.benchmark.baselines import register_packed_attention
from kvq.benchmark.contenders import DYNAMIC, backend_configs, list_baselines, list_own
from kvq.benchmark.generation import (
    WARMUPS,
    Effort,
    Forward,
    Times,
    choose_for_forwards,
    choose_for_steps,
    measure_forwards,
    measure_steps,
)
from kvq.benchmark.models import ModelTrials
from kvq.benchmark.run import BenchmarkPlan, run
from kvq.benchmark.setting import Setting, Shape
from kvq.benchmark.trial import LayerTrial

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, query_heads=4, heads=2, head_dim=64, hidden_size=64, intermediate_size=64, vocabulary=128)
SETTING = Setting(SHAPE, 320, 1, torch.float32, CPU)


@pytest.fixture(autouse=True)
def _attentions():
    register_packed_attention()


@pytest.fixture
def trials():
    """Trials by label, as they are made."""
    return {}


@pytest.fixture
def effort(trials):
    make = ModelTrials()

    def make_trial(contender, setting, spare):
        trials[contender.label] = make(contender, setting, spare)
        return trials[contender.label]

    return Effort(3, 1e9, make_trial)


def all_contenders():
    return [*list_baselines(), *list_own(backend_configs(["native"], 4))]


@pytest.mark.parametrize(
    ("forward", "kept"), [(Forward(40), 40), (Forward(5, is_draft=True), 2)], ids=["chunk", "draft"]
)
def test_chunks_stay_and_drafts_lose_their_rejected_tokens(effort, trials, forward, kept):
    contenders = choose_for_forwards(all_contenders())
    facts = measure_forwards(contenders, SETTING, forward, effort)
    done = 3 + WARMUPS + 2  # memory is counted over two forwards more
    assert [one["label"] for one in facts["contenders"]] == [one.label for one in contenders]
    assert {trial.cache.get_seq_length() for trial in trials.values()} == {320 + done * kept}
    assert facts["rejected"] == forward.tokens - kept
    ours = facts["contenders"][-1]
    assert ours["kernel"] in {"compiled", "blockwise", "eager"}
    assert trials[ours["label"]].cache.layers[0].record_past is forward.is_draft
    dynamic = next(one for one in facts["contenders"] if one["label"] == DYNAMIC)
    assert dynamic["to_dynamic"]["median"] == 1


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("records", [(), ("compiled",)], ids=["torch alone", "compiled"])
def test_a_chunk_is_read_without_the_history_in_full_precision(effort, give_records, records):
    give_records(*records)
    setting = Setting(SHAPE, 6000, 1, torch.float32, CPU)
    contenders = [one for one in all_contenders() if one.attention == "kvq" and one.kernel is None]
    (one,) = measure_forwards(contenders, setting, Forward(32), effort)["contenders"]
    history_of_a_layer = 2 * 6000 * SHAPE.heads * SHAPE.head_dim * 4
    assert 0 < one["transient_bytes"] < history_of_a_layer


def test_steps_in_a_row_count_the_flushes(effort, trials, monkeypatch):
    """Elapsed "time" is 1, and 5 where the store grew, so that the largest of 100 is a flush."""

    def five_for_a_flush(call, device):
        layer = call.__self__.cache.layers[0]
        before = layer.side("key").store.length if hasattr(layer, "side") else 0
        call()
        return 5.0 if hasattr(layer, "side") and layer.side("key").store.length > before else 1.0

    monkeypatch.setattr(generation, "time_call", five_for_a_flush)
    many = Effort(140, effort.limit_s, effort.make_trial)
    facts = measure_steps(choose_for_steps(all_contenders()), SETTING, many)
    assert facts["steps"] == 140
    assert [(one["median_ms"], one["p99_ms"], one["p99_to_median"]) for one in facts["contenders"]] == [
        (1, 1, 1),
        (1, 5, 5),
    ]


@pytest.mark.parametrize(("share", "expected"), [(0.99, 99), (0.5, 50), (1, 100), (0.001, 1)])
def test_a_percentile_is_that_of_the_ranks(share, expected):
    assert Times("x", [float(number) for number in range(100, 0, -1)]).percentile(share) == expected


def test_what_takes_too_long_is_left_out_with_its_reason(effort):
    impatient = Effort(3, 0.0, effort.make_trial)
    contenders = choose_for_forwards(all_contenders())
    for facts in (
        measure_forwards(contenders, SETTING, Forward(4), impatient),
        measure_steps(contenders, SETTING, impatient),
    ):
        for one in facts["contenders"]:
            assert "0 s are allowed" in one["failure"]
            assert one.get("time_ms") is one.get("median_ms") is None


def test_memory_of_a_model_is_that_of_the_attention_of_the_contender():
    """The model is shared: whoever had its turn last left its own attention behind."""
    contenders = list_own(backend_configs(["native"], 4))
    setting = Setting(SHAPE, 3000, 1, torch.float32, CPU)
    (result,) = run(BenchmarkPlan(list(contenders), [setting], rounds=3, flushes=0, make_trial=ModelTrials()))
    fused, eager, materialized = (one.transient_bytes for one in result.measured)
    history_of_a_layer = 2 * 3000 * SHAPE.heads * SHAPE.head_dim * 4
    assert materialized > history_of_a_layer > fused
    assert history_of_a_layer > eager


def test_the_reference_is_forced_for_its_contender_only():
    read_by = {}
    for contender in list_own(backend_configs(["native"], 4)):
        trial = LayerTrial(contender, SETTING, 10)
        with torch.inference_mode():
            trial.fill()
            trial.step()
        read_by[contender.label.rpartition(", ")[2]] = trial.kernel
    assert read_by["eager"] == "eager"
    assert read_by["materialized"] == ""
