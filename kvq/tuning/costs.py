"""What settings of single sides cost: as measured, or as far as what was measured tells.

Most settings are not worth measuring: no answer would take them. So each setting has a bound that it will hardly fall
below, by the rule that a bit more takes the error to a quarter. A choice that is best by measured costs and bounds, and
consists of measured ones alone, is best of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kvq.plugin_api.quantizer import Side
from kvq.tuning.sensitivity import Probe, Sensitivity
from kvq.tuning.side_setting import SideSetting

GAIN_OF_A_BIT = 4.0
"""By how much the divergence falls with one bit more: the step halves, and the divergence goes with its square."""
OPTIMISM = 0.4
"""The part of an estimate that a measurement hardly falls below, where another width tells."""
OPTIMISM_AT_A_WIDTH = 0.7
"""The same where the same width tells, in another way of quantizing."""

CostOf = Callable[[Probe], float]
"""Returns what a probe costs, in nats."""


class Costs:
    """Measured costs, and what they tell about the others."""

    def __init__(self) -> None:
        self._measured: dict[Probe, Sensitivity] = {}
        self._by_place: dict[tuple[tuple[int, ...], Side], list[Sensitivity]] = {}

    @property
    def sensitivities(self) -> list[Sensitivity]:
        """All measurements, those of a group of layers one after another."""
        return sorted(self._measured.values(), key=lambda one: (one.probe.layers, one.probe.side))

    def add(self, found: Iterable[Sensitivity]) -> None:
        """Take measurements."""
        for one in found:
            self._measured[one.probe] = one
            self._by_place.setdefault((one.probe.layers, one.probe.side), []).append(one)

    def list_unknown(self, probes: Iterable[Probe]) -> list[Probe]:
        """Return the probes that are not measured, each once."""
        return [one for one in dict.fromkeys(probes) if one not in self._measured]

    def known(self, probe: Probe) -> float:
        """Return what a probe costs; infinity if it is not measured."""
        found = self._measured.get(probe)
        return math.inf if found is None else found.kl

    def estimate(self, probe: Probe) -> float:
        """Return what a probe costs, or what the likest measured setting of that side lets expect."""
        likest = self._find_likest(probe)
        found: float = likest.kl * GAIN_OF_A_BIT ** (likest.probe.setting.nbits - probe.setting.nbits)
        return found

    def bound(self, probe: Probe) -> float:
        """Return what a probe costs, or what it will hardly fall below."""
        likest = self._find_likest(probe).probe
        if likest == probe:
            return self.estimate(probe)
        is_same_width = likest.setting.nbits == probe.setting.nbits
        return self.estimate(probe) * (OPTIMISM_AT_A_WIDTH if is_same_width else OPTIMISM)

    def _find_likest(self, probe: Probe) -> Sensitivity:
        return self._measured.get(probe) or _find_likest(self._by_place[probe.layers, probe.side], probe.setting)


def _find_likest(measured: Sequence[Sensitivity], setting: SideSetting) -> Sensitivity:
    """Return the measurement whose setting differs least: in other things than bits first, then in bits."""

    def distance(one: Sensitivity) -> tuple[bool, float, bool]:
        other = one.probe.setting
        is_alike = replace(other, nbits=setting.nbits, clip=setting.clip) == setting
        return not is_alike, abs(other.nbits - setting.nbits), other.clip != setting.clip

    return min(measured, key=distance)
