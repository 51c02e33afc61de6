"""Tables of docs/quality.md from results."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from quality_tables import BEFORE, TAIL_COLUMNS, TOY_ROWS, TOYS, compare_rows, quality_rows

from kvq import KVQCacheConfig
from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.free_running import Divergence
from kvq.evaluation.quality.metrics import TokenScores
from kvq.evaluation.quality.needle import NeedleScore
from kvq.evaluation.quality.record import BatchResult, summarize

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def make_report(**tasks):
    scores = TokenScores(*torch.rand(4, 3, 400, generator=torch.Generator().manual_seed(0)))
    batch = BatchResult(scores, 3 * 1024, 12 * 1024, None, (4.5, 2.5), **tasks)
    record = summarize(Candidate("a", lambda model: None, {}), [batch], torch.arange(400), 16).to_dict()
    return {"format": 2, "records": json.loads(json.dumps([record]))}, record


def test_a_report_with_percentiles_shows_them():
    answer = NeedleScore(0.5, True, 5, 5, -1.0)
    report, record = make_report(needles=[(answer, answer)] * 2, divergences=[Divergence(3.0, 0.25)] * 2)
    (row,) = quality_rows(report)
    cells = dict(zip(TAIL_COLUMNS, row, strict=True))
    assert cells["median"] == f"{record['kl_p50']:.1e}"
    assert cells["99.9 %"] == f"{record['kl_p999']:.1e}"
    assert (cells["key, log p"], cells["drift"]) == ("-0.200", "0.250")
    assert (cells["bits K / V"], cells["KiB held"], cells["smaller"]) == ("4.50 / 2.50", "1", "4.00x")


def test_tasks_that_were_left_out_are_a_dash():
    report, _ = make_report()
    cells = dict(zip(TAIL_COLUMNS, quality_rows(report)[0], strict=True))
    assert (cells["key, log p"], cells["drift"]) == ("-", "-")


def test_one_text_has_no_interval():
    report, _ = make_report()
    report["records"][0]["kl"] = {"mean": 0.0123, "half_width": None}
    assert quality_rows(report)[0][1] == "1.2e-02"


def test_the_check_of_the_defaults_is_of_the_defaults():
    for toy in TOYS:
        records = {one["label"]: one for one in json.loads((RESULTS / f"defaults-{toy}.json").read_text())["records"]}
        assert KVQCacheConfig.from_mapping(records["today"]["settings"]) == KVQCacheConfig()
        before = records[BEFORE]["settings"]
        assert {before[f"{step}_{side}"] for step in ("rotation", "balance") for side in "kv"} == {"none"}
        assert (before["axis_value"], before["residual_length"]) == ("per_token", 128)
        assert set(records) == set(TOY_ROWS)


def test_the_page_says_of_the_toys_what_they_show():
    """That the defaults of today are no worse at the same window, and where they are better."""
    for toy in TOYS:
        records = {one["label"]: one for one in json.loads((RESULTS / f"defaults-{toy}.json").read_text())["records"]}
        verdict = compare_rows(records["before-short-window"], records["today"]).split(", ")[1]
        assert verdict in ("better", "tie")
