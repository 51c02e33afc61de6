"""Tables of docs/quality.md from reports of every format that was ever committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quality_tables import COLUMNS, TAIL_COLUMNS, quality_columns, quality_rows

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
    cells = dict(zip(quality_columns(report), row, strict=True))
    assert quality_columns(report) == TAIL_COLUMNS
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


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality_report_*.json")), ids=lambda path: path.stem)
def test_a_committed_report_has_a_cell_in_every_column(path):
    report = json.loads(path.read_text("utf-8"))
    rows = quality_rows(report)
    assert len(rows) >= 5
    assert {len(row) for row in rows} == {len(quality_columns(report))}
    assert (quality_columns(report) == COLUMNS) == ("format" not in report)
