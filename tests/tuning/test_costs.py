"""What settings that nobody has measured may cost, from those that somebody has."""

from __future__ import annotations

import math

import pytest

from kvq.tuning.costs import OPTIMISM, OPTIMISM_AT_A_WIDTH, Costs
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.sensitivity import Probe, Sensitivity, list_first_probes
from kvq.tuning.side_setting import SideSetting

FOUR = SideSetting("native", 4)


def probe(setting, layers=(0,), side="key"):
    return Probe(layers, side, setting)


@pytest.fixture
def costs():
    found = Costs()
    found.add([Sensitivity(probe(FOUR), 0.01, 0.0), Sensitivity(probe(FOUR, side="value"), 7.0, 0.0)])
    return found


@pytest.mark.parametrize(
    ("setting", "estimate", "part"),
    [
        (FOUR, 0.01, 1.0),
        (SideSetting("native", 5), 0.0025, OPTIMISM),
        (SideSetting("native", 2), 0.16, OPTIMISM),
        (SideSetting("native", 4, clip=0.9), 0.01, OPTIMISM_AT_A_WIDTH),
        (SideSetting("quanto", 8), 0.01 / 256, OPTIMISM),
    ],
)
def test_a_bit_is_worth_a_factor_of_four(costs, setting, estimate, part):
    assert costs.estimate(probe(setting)) == pytest.approx(estimate)
    assert costs.bound(probe(setting)) == pytest.approx(part * estimate)


def test_the_likest_measurement_tells(costs):
    """Another width of the same kind tells more than the same width of another kind, and the nearest width most."""
    other = SideSetting("native", 4, rotation="none")
    costs.add([Sensitivity(probe(other), 0.5, 0.0), Sensitivity(probe(SideSetting("native", 2)), 0.3, 0.0)])
    assert costs.estimate(probe(SideSetting("native", 3, rotation="none"))) == pytest.approx(2.0)
    assert costs.estimate(probe(SideSetting("native", 1))) == pytest.approx(1.2)
    assert costs.estimate(probe(SideSetting("native", 2, clip=0.7))) == pytest.approx(0.3)


def test_what_is_not_measured_is_known_to_nobody(costs):
    two = probe(SideSetting("native", 2))
    assert costs.known(two) == math.inf
    assert costs.list_unknown([probe(FOUR), two, two]) == [two]
    costs.add([Sensitivity(two, 0.2, 0.0)])
    assert costs.known(two) == costs.bound(two) == 0.2
    assert [one.probe.side for one in costs.sensitivities] == ["key", "key", "value"]


@pytest.mark.parametrize(("bits", "first"), [((2, 3, 8), 3), ((2, 4, 8), 4), ((2, 4), 2), ((8,), 8)])
def test_every_side_begins_with_a_middle_width(bits, first):
    settings = tuple(SideSetting("native", one) for one in bits)
    found = list_first_probes(SearchSpace(settings, settings, ((0, 1), (2,))))
    assert [(one.layers, one.side, one.setting.nbits) for one in found] == [
        ((0, 1), "key", first),
        ((0, 1), "value", first),
        ((2,), "key", first),
        ((2,), "value", first),
    ]
