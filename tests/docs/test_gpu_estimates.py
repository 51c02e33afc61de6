"""Estimates for GPUs, against arithmetic by hand."""

import json

import pytest
from gpu_estimate_tables import RESULT, Estimate


def test_the_times_that_bytes_and_instructions_imply():
    program = {
        "compute_capability": 90,
        "effective_bits": [4.5, 4.5],
        "tile_tokens": 64,
        "warps": 2,
        "instructions_per_tile_and_warp": 1000,
    }
    estimate = Estimate.of(program, 128, rows=8, tokens=32768)
    # 8 rows, 8 heads, 32,768 tokens of 128 + 128 elements: 302 MB at 4.5 bits, at 4,800 GB/s.
    assert estimate.reading == pytest.approx(62.9, abs=0.1)
    assert estimate.full_precision == pytest.approx(223.7, abs=0.1)
    # 32,768 tiles of 2,000 instructions, over 132 x 4 schedulers at 1.98 GHz.
    assert estimate.issuing == pytest.approx(62.7, abs=0.1)
    assert estimate.total == estimate.reading


def test_the_committed_programs_are_those_of_three_kinds_of_card():
    programs = json.loads(RESULT.read_text(encoding="utf-8"))["programs"]
    kinds = {(one["settings"], one["compute_capability"]) for one in programs}
    assert len(kinds) == len(programs) == 3 * len({name for name, _ in kinds})
    assert {number for _, number in kinds} == {80, 90, 120}
    assert all(one["matrix_products_per_tile_and_warp"] for one in programs)
