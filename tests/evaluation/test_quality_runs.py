"""A run that is stopped and goes on, one that several processes share, and the texts, gates and pictures around it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvq.errors import EvaluationError
from kvq.evaluation.quality.candidates import find_window, list_peers
from kvq.evaluation.quality.gate import METRICS, find_failures, parse_gate
from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.quality.needle import build_task
from kvq.evaluation.quality.picture import draw_records, pareto_front
from kvq.evaluation.quality.processes import Processes
from kvq.evaluation.quality.record import QualityRecord
from kvq.evaluation.quality.report import (
    COLUMNS,
    DEPTH_COLUMNS,
    DETAIL_COLUMNS,
    TASK_COLUMNS,
    depth_rows,
    describe_left_out,
    describe_plan,
    detail_rows,
    list_ties,
    table_rows,
    task_rows,
)
from kvq.evaluation.quality.run import Budget, evaluate
from kvq.evaluation.quality.text import load_dataset, load_files

LABELLED = {"four": {"nbits_v": 4}, "two": {"nbits_v": 2}}


class Stop(BaseException):
    """What Ctrl-C does to a run."""


class CountingForward:
    """Counts the forwards of a model while it is entered."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.add)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def add(self, *_):
        self.count += 1


@pytest.fixture(scope="module")
def uninterrupted():
    """The records of `LABELLED` by the steps in which the text was read, and their forwards, measured once."""
    return {}


@pytest.fixture
def measure_whole(make_plan, loaded, uninterrupted):
    """Return a function that measures `LABELLED` without a stop, and returns the records and the forwards."""

    def measure(step):
        if step not in uninterrupted:
            with CountingForward(loaded[0]) as whole:
                records = evaluate(make_plan(LABELLED, step=step))
            uninterrupted[step] = records, whole.count
        return uninterrupted[step]

    return measure


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_an_interrupted_run_goes_on_where_it_stopped(make_plan, loaded, tmp_path, measure_whole, stop_at):
    plan = make_plan(LABELLED, step=32)
    seen = []

    def interrupt(label, _):
        seen.append(label)
        if len(seen) == stop_at * plan.units // 6:
            raise Stop

    with pytest.raises(Stop):
        evaluate(plan, parts=tmp_path / "parts", on_progress=interrupt)
    kept = len(list((tmp_path / "parts").glob("*.pt"))) if (tmp_path / "parts").exists() else 0
    with CountingForward(loaded[0]) as rest:
        resumed = evaluate(plan, parts=tmp_path / "parts")
    records, count = measure_whole(32)
    assert resumed == records
    per_pass = count / (plan.batches * 3)  # full precision and two candidates on each batch
    assert rest.count <= count - kept * per_pass
    with CountingForward(loaded[0]) as again:
        assert evaluate(plan, parts=tmp_path / "parts") == resumed
    assert again.count == 0


def test_a_further_configuration_is_all_that_is_measured(make_plan, loaded, tmp_path, measure_whole):
    evaluate(make_plan({"four": LABELLED["four"]}), parts=tmp_path)
    with CountingForward(loaded[0]) as forward:
        evaluate(make_plan({"four": LABELLED["four"]}, step=16), parts=tmp_path)
        assert forward.count == 0
        evaluate(make_plan(LABELLED), parts=tmp_path)
        both = forward.count
        evaluate(make_plan(LABELLED, step=32), parts=tmp_path)
    assert forward.count - both == measure_whole(32)[1]  # other steps are another measurement


def test_processes_share_the_batches_and_agree(make_plan, measure_whole):
    plan = make_plan(LABELLED, step=32)
    alone, _ = measure_whole(32)
    shares = []

    class Half(Processes):
        """One of two processes that run after each other; the second one has what the first one gathered."""

        def gather(self, entries):
            shares.append(list(entries))
            earlier = shares[len(shares) - 3] if self.index else []
            return [*earlier, *entries]

    (first, _) = evaluate(plan, processes=Half(0, 2))
    assert len(first.kl_by_sequence) == 3  # the first and the last of three batches: two sequences and one
    assert evaluate(plan, processes=Half(1, 2)) == alone


def test_progress_counts_every_forward(make_plan, loaded, monkeypatch):
    monkeypatch.setattr("kvq.evaluation.quality.plan.AT_ONCE", 1)
    monkeypatch.setattr("kvq.evaluation.quality.run.AT_ONCE", 1)
    task = build_task(loaded[1], torch.zeros(1, 1), length=200, per_depth=4)
    plan = make_plan(LABELLED, needles=task, continuation=5)
    told = []
    evaluate(plan, on_progress=lambda label, done: told.append((label, done)))
    assert sum(done for _, done in told) == plan.units
    assert [label for label, _ in told[:2]] == ["full precision", "reading texts 1 to 2 of 5"]
    assert told[-1][0] == "writing texts 5 to 5 of 5"


def test_caches_that_read_side_by_side_share_full_precision(make_plan, loaded, monkeypatch):
    with CountingForward(loaded[0]) as together:
        both = evaluate(make_plan(LABELLED))
    monkeypatch.setattr("kvq.evaluation.quality.run.AT_ONCE", 1)
    with CountingForward(loaded[0]) as apart:
        assert evaluate(make_plan(LABELLED)) == both
    prompt, steps = 1, 17  # of each of three batches: 128 tokens, then 271 in steps of 16
    assert together.count == 3 * (prompt + 3 * steps)
    assert apart.count == 3 * 2 * (prompt + 2 * steps)


@pytest.mark.parametrize(("seconds", "read"), [(0, 2), (29, 2), (30, 4), (44, 4), (45, 5), (None, 5)])
def test_a_budget_leaves_out_the_same_texts_of_every_cache(make_plan, seconds, read):
    plan = make_plan(LABELLED)
    whole = evaluate(plan)
    ticks = iter([0.0, 15.0, 30.0, 45.0])  # three batches of 15 s
    records = evaluate(plan, budget=Budget(seconds, clock=lambda: next(ticks)))
    for record, expected in zip(records, whole, strict=True):
        assert record.kl_by_sequence == expected.kl_by_sequence[:read]
    line = describe_left_out(plan, records)
    assert (line is None) == (read == 5)
    if line:
        assert f"{5 - read} of 5 sequences" in line
        assert f"the other {read}" in line
        assert "share" not in line  # nothing was asked or written
        assert "with their share of continuations," in str(describe_left_out(replace(plan, continuation=8), records))


def test_a_window_that_is_shorter_than_a_step_is_named(make_plan):
    plan = make_plan({"short": {"residual_length": 8}, "long": {"residual_length": 16}}, continuation=100)
    assert describe_plan(plan, "a model") == [
        "a model on recall-report: 5 sequences of 400 tokens, 755 of them scored",  # 31 records; 151 words of answers
        "the first 128 tokens of each in full precision, the rest from the cache in steps of 16",
        "the step is longer than the window of short: --step 1 reads as generation does",
        "a greedy continuation of 100 tokens behind 300 of each sequence",
    ]
    assert "window" not in "".join(describe_plan(make_plan({"short": {"residual_length": 8}}, step=8), "a model"))


def test_windows_of_layers_and_of_transformers_caches_count(make_plan):
    """The model has three layers."""
    caches = {
        "one layer": {"layers": {"1": {"residual_length": 32}}},
        "all layers": {
            "residual_length": 8,
            "layers": {"0-1": {"residual_length": 200}, "2": {"full_precision": True}},
        },
    }
    plan = make_plan(caches, step=129)
    lines = describe_plan(replace(plan, candidates=[*plan.candidates, *list_peers()]), "a model")
    peers = "transformers quanto 4, transformers quanto 2, transformers hqq 4, transformers hqq 2"
    assert f"the step is longer than the window of one layer, {peers}: --step 1 reads as generation does" in lines
    lines = describe_plan(replace(plan, candidates=[*plan.candidates, *list_peers()], step=128), "a model")
    assert "the step is longer than the window of one layer: --step 1 reads as generation does" in lines


def test_single_tokens_are_no_longer_than_any_window(make_plan):
    assert "window" not in "".join(describe_plan(make_plan({"none": {"residual_length": 0}}, step=1), "a model"))


def test_the_window_of_transformers_caches_is_theirs(loaded):
    by_label = {candidate.label: candidate for candidate in list_peers()}
    hqq = by_label["transformers hqq 4"]
    assert find_window(hqq, loaded[0]) == hqq.build(loaded[0]).layers[0].residual_length
    assert find_window(by_label["transformers fp8"], loaded[0]) is None


def test_neighbours_within_the_spread_are_called_a_tie():
    texts = {"a": (1.0, 1.1, 1.2), "b": (1.4, 1.0, 1.3), "c": (4.0, 4.1, 4.2), "failed": ()}
    records = [
        QualityRecord(name, {}, kl=Estimate(sum(kl) / 3, 0.1), kl_by_sequence=kl, failure=None if kl else "no")
        for name, kl in texts.items()
    ]
    assert list_ties(records[::-1]) == ["a tie within the spread over sequences: a and b"]


def test_one_sequence_makes_no_tie():
    records = [
        QualityRecord(name, {}, kl=Estimate(kl, math.nan), kl_by_sequence=[kl]) for name, kl in (("a", 1), ("b", 9))
    ]
    assert [line.split(":")[0] for line in list_ties(records)] == ["one sequence has no spread"]
    assert list_ties(records[:1]) == []


def test_sequences_of_a_file_are_whole_and_evenly_spaced(loaded, tmp_path):
    class Letters:
        """A tokenizer of one token a letter."""

        bos_token_id = 9999

        def __len__(self):
            return 10_000

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    path = tmp_path / "a.txt"
    path.write_text("".join(chr(200 + place) for place in range(1000)))
    found = load_files([path], Letters(), sequences=3, length=101)
    assert found.sequences[:, 0].tolist() == [9999] * 3
    assert found.sequences[:, 1].tolist() == [200, 650, 1100]
    assert (found.sequences[:, 1:].diff() == 1).all()
    assert found.scored.all()
    with pytest.raises(EvaluationError, match="1000 tokens, but 11 sequences of 101"):
        load_files([path], Letters(), sequences=11, length=101)


def test_parts_of_a_text_are_different(loaded):
    calibration, report = (
        load_dataset(f"recall-{part}", loaded[1], sequences=2, length=300) for part in ("calibration", "report")
    )
    assert calibration.digest != report.digest
    assert torch.equal(calibration.scored, report.scored)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("kl", "'kl' is not a condition"),
        ("", "'' is not a condition"),
        ("kl<nan", "is not a condition"),
        ("kl<0.1 top1>0.9", "is not a condition"),
        ("kl==0", "is not a condition"),
        ("klx<1", "'klx' is not measured; choose from kl, .*; did you mean 'kl'"),
        ("top1>1", "'top1>1' can never be met: top1 lies between 0 and 1"),
        ("kl<0", "can never be met"),
        ("ppl_change<-1", "can never be met"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(gate, message):
    with pytest.raises(EvaluationError, match=message):
        parse_gate(gate)


def test_a_gate_is_met_or_says_by_what_it_is_not():
    record = QualityRecord("a", {}, kl=Estimate(0.04, 0.01), top1=0.97, perplexity=2.1, reference_perplexity=2.0)
    assert list(find_failures(record, parse_gate("kl<0.05, top1>=0.97,ppl_change<=0.051"))) == []
    assert list(find_failures(record, parse_gate("kl<0.04,top1>0.97"))) == [
        "kl<0.04 is not met: 0.04",
        "top1>0.97 is not met: 0.97",
    ]
    # What was not measured meets nothing, whichever way the condition points.
    assert len(list(find_failures(record, parse_gate("needle>0.5,needle<0.5")))) == 2
    assert list(find_failures(replace(record, failure="broken"), parse_gate("kl<1"))) == ["broken"]
    assert all(math.isfinite(read(record)) for name, (read, _, _) in METRICS.items() if name in ("kl", "top1"))


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 9), "b": (2, 5), "c": (3, 5), "d": (4, 1), "e": (4, 2), "f": (5, 3)}
    records = [QualityRecord(name, {}, held_bytes=x, kl=Estimate(y, 0)) for name, (x, y) in points.items()]
    assert [one.label for one in pareto_front(records, lambda one: one.held_bytes)] == ["a", "b", "d"]


def test_a_picture_is_drawn_and_an_empty_one_refused(tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    records = [
        QualityRecord(name, {}, is_peer=name == "c", held_bytes=2**20 * x, effective_bits=x, kl=Estimate(y, y / 5))
        for name, x, y in (("a", 3, 0.1), ("b", 5, 0.01), ("c", 5, 0.05))
    ]
    records[1] = replace(records[1], kl_p99=0.2, kl_p999=0.9)
    draw_records(records, tmp_path / "a.png", "a title")
    image = matplotlib.imread(tmp_path / "a.png")
    assert image.shape[0] > 600
    assert image.shape[1] > 1200
    assert len({tuple(color) for row in image[::7, ::7] for color in row.round(1)}) > 8
    with pytest.raises(EvaluationError, match="nothing to draw"):
        draw_records([QualityRecord("a", {}, failure="no")], tmp_path / "b.png", "")


def test_rows_have_a_cell_for_each_column(make_plan):
    records = evaluate(make_plan(LABELLED))
    assert {len(row) for row in table_rows(records)} == {len(COLUMNS)}
    assert {len(row) for row in detail_rows(records)} == {len(DETAIL_COLUMNS)}
    assert {len(row) for row in depth_rows(records)} == {len(DEPTH_COLUMNS)}
    assert task_rows(records) == []
    asked = replace(records[0], needle_by_depth={"0.1": 1.0})
    written = replace(records[1], unchanged=0.5, first_difference=(3.0, 40.0, math.inf), drift=Estimate(0.25, 0.125))
    assert {len(row) for row in task_rows([asked, written])} == {len(TASK_COLUMNS)}
    assert task_rows([written])[1][4:] == ("40 (3 to none)", "50.0%", "0.250 ± 0.125")
    assert [row[0] for row in table_rows(records)] == ["full precision", "four", "two"]
    failed = QualityRecord("x", {}, failure="no")
    assert len(table_rows([*records, failed])) == 3
    assert table_rows([failed]) == []


@pytest.mark.parametrize(
    ("variables", "is_first"), [({}, True), ({"RANK": "", "WORLD_SIZE": ""}, True), ({"RANK": "1"}, False)]
)
def test_an_empty_variable_of_a_launcher_is_not_set(monkeypatch, variables, is_first):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert Processes.is_first() is is_first
    assert Processes.find() == Processes(0, 1)
