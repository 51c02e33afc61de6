"""The table of error feedback in docs/method.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rounding_tables import COLUMNS, RESULT, rounding_rows

from kvq import KVQCacheConfig

CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "rounding"


def measured(rounding, kls, nbits=(3, 3), held=100):
    return {
        "settings": {"nbits_k": nbits[0], "nbits_v": nbits[1], "rounding_k": rounding},
        "kl": {"mean": sum(kls) / len(kls)},
        "kl_by_sequence": kls,
        "held_bytes": held,
        "compression": 4.0,
    }


def test_each_pair_is_compared_text_by_text():
    # 0.03 / 0.06; text by text 0.01 / 0.04 and 0.05 / 0.08
    records = [measured("error_feedback", [0.01, 0.05]), measured("nearest", [0.04, 0.08])]
    more = [measured(word, [0.2, 0.2], (4, 2)) for word in ("nearest", "error_feedback")]
    rows = [dict(zip(COLUMNS[1:], row, strict=True)) for row in rounding_rows([*records, *more])]
    assert [row["bits K / V"] for row in rows] == ["4 / 2", "3 / 3"]
    assert (rows[1]["nearest"], rows[1]["error feedback"]) == ("0.06000", "0.03000")
    assert (rows[1]["of nearest"], rows[1]["text by text"]) == ("0.50x", "0.25x to 0.62x")


@pytest.mark.parametrize("other", [[], [measured("error_feedback", [0.1], held=101)]], ids=["missing", "larger"])
def test_what_differs_in_more_is_not_compared(other):
    with pytest.raises(ValueError, match=r"bits \(3, 3\): one cache of each rounding is needed, of the same bytes"):
        rounding_rows([measured("nearest", [0.1]), *other])


@pytest.mark.filterwarnings("ignore:nbits_k=. is below nbits_v=8")
def test_pairs_differ_in_rounding_alone():
    """The file of statistics lies where `make real-rounding` writes it, and not in the tree."""
    paths = sorted(CONFIGS.glob("*-nearest.yaml"))
    assert len(paths) == 7
    for path in paths:
        config = KVQCacheConfig.from_file(path)
        other = path.with_name(path.name.replace("nearest", "error-feedback")).read_text(encoding="utf-8")
        lines = set(other.splitlines()) - set(path.read_text(encoding="utf-8").splitlines())
        assert {line for line in lines if not line.startswith("#")} == {
            "rounding_k: error_feedback",
            "calibration: ../../build/smollm2-calibration.safetensors",
        }
        assert config.rounding_k == "nearest"


def test_results_name_no_folder_of_a_machine():
    records = [one for run in json.loads(RESULT.read_text(encoding="utf-8")).values() for one in run["records"]]
    files = {one["settings"]["calibration"]["file"] for one in records if one["settings"]["calibration"]}
    assert len(files) == 1
    assert not Path(files.pop()).is_absolute()
