"""The table of quality targets in docs/quality.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from quality_targets import COLUMNS, TARGETS, target_rows

from kvq import KVQCacheConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "targets").glob("*.yaml"))


def measured(label, kls, nbits=None, peer=None, failure=None):
    settings = {"transformers": peer} if peer else {"nbits_k": nbits[0], "nbits_v": nbits[1]}
    return {
        "label": label,
        "settings": settings,
        "is_peer": peer is not None,
        "failure": failure,
        "kl": {"mean": sum(kls) / len(kls)} if kls else None,
        "kl_by_sequence": kls,
        "compression": 4.0,
    }


QUANTO = measured("transformers quanto 4", [0.02, 0.04], peer={"backend": "quanto", "nbits": 4})
HQQ = measured("transformers hqq 4", [0.01, 0.03], peer={"backend": "hqq", "nbits": 4})
SMALLER = measured("transformers hqq 2", [0.001, 0.001], peer={"backend": "hqq", "nbits": 2})
"""Were it compared with, though it has 2 bits, every ratio would be larger."""


def test_each_configuration_is_compared_with_the_best_4_bits():
    # hqq has the lower mean, 0.02, of which 0.001 is 0.05; text by text 0.0004 / 0.01 and 0.0016 / 0.03
    rows = target_rows([measured("ours", [0.0004, 0.0016], (4, 4)), QUANTO, HQQ, SMALLER])
    assert [row[0] for row in rows] == [QUANTO["label"], HQQ["label"], SMALLER["label"], "`ours`"]
    cells = dict(zip(COLUMNS, rows[-1], strict=True))
    assert (cells["of theirs"], cells["text by text"]) == ("0.05x", "0.04x to 0.053x")
    assert (cells["at least"], cells["aim"], cells["reached"]) == ("0.07x", "0.04x", "at least")


@pytest.mark.parametrize(
    ("kl", "reached"), [(0.0081, "no"), (0.0079, "at least"), (0.0041, "at least"), (0.0039, "aim")]
)
def test_a_target_is_reached_or_not(kl, reached):
    assert target_rows([measured("ours", [kl, kl], (3, 3)), HQQ])[-1][-1] == reached


def test_what_was_not_measured_or_has_no_target_has_no_row():
    rows = target_rows([measured("8", [0.1], (8, 8)), measured("failed", [], (4, 4), failure="RuntimeError"), HQQ])
    assert [row[0] for row in rows] == [HQQ["label"]]


def test_without_transformers_4_bits_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError, match="add --peer quanto-4"):
        target_rows([measured("ours", [0.1], (4, 4)), SMALLER])


@pytest.mark.parametrize("nbits", TARGETS, ids=str)
def test_every_target_has_a_configuration_as_it_says(nbits):
    configs = [KVQCacheConfig.from_file(path) for path in CONFIGS]
    held = [config for config in configs if (config.nbits_k, config.nbits_v) == nbits]
    assert held
    assert {(config.q_group_size, config.residual_length, config.sink_length) for config in held} == {(64, 32, 4)}
