"""What each setting of each side of each group of layers costs alone: everything else stays in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq.plugin_api.quantizer import Side
from kvq.tuning.calibration import CalibrationText
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.side_setting import Assignment, Pair, SideSetting

FIRST_BITS = 3
"""Bits that every side is measured at."""


@dataclass(frozen=True)
class Probe:
    """One side of a group of layers under one setting.

    Attributes:
        layers: the layers of the group.
        side: keys or values.
        setting: the setting.
    """

    layers: tuple[int, ...]
    side: Side
    setting: SideSetting

    @property
    def assignment(self) -> Assignment:
        """The settings of all its layers."""
        pair = Pair(self.setting, None) if self.side == "key" else Pair(None, self.setting)
        return dict.fromkeys(self.layers, pair)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a probe.

    Attributes:
        probe: the probe.
        kl: mean divergence of the next token, in nats.
        spread: standard error of `kl` over tokens, as if they were independent.
    """

    probe: Probe
    kl: float
    spread: float

    @classmethod
    def of(cls, probe: Probe, divergences: torch.Tensor) -> Sensitivity:
        """Take the divergences of all predicted tokens, `[N, S]`."""
        flat = divergences.double().flatten()
        return cls(probe, float(flat.mean()), float(flat.std(correction=0) / len(flat) ** 0.5))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        probe = self.probe
        setting = probe.setting.to_dict()
        return {"layers": list(probe.layers), "side": probe.side, **setting, "kl": self.kl, "spread": self.spread}


def split_pair(layers: tuple[int, ...], pair: Pair) -> list[Probe]:
    """Return the probes of the quantized sides of a group of layers under a pair of settings."""
    sides: tuple[tuple[Side, SideSetting | None], ...] = (("key", pair.key), ("value", pair.value))
    return [Probe(layers, side, setting) for side, setting in sides if setting is not None]


def list_first_probes(space: SearchSpace) -> list[Probe]:
    """Return a probe of each side of each group of layers, from which the others are estimated: a middle width."""
    key, value = _middle(space.keys), _middle(space.values)
    return [probe for group in space.groups for probe in split_pair(group, Pair(key, value))]


def measure_probes(probes: Sequence[Probe], text: CalibrationText) -> list[Sensitivity]:
    """Measure probes, those of the first layers first: neighbours run in one batch, which begins at the first of them.

    Args:
        probes: the probes.
        text: measures them.
    """
    ordered = sorted(probes, key=lambda probe: (probe.layers, probe.side))
    divergences = text.measure([probe.assignment for probe in ordered], "single effects")
    return [Sensitivity.of(*one) for one in zip(ordered, divergences, strict=True)]


def _middle(settings: Sequence[SideSetting]) -> SideSetting:
    """Return the setting at 3 bits where there is one, else one with a middle number of bits; the first of these."""
    bits = sorted({one.nbits for one in settings})
    chosen = FIRST_BITS if FIRST_BITS in bits else bits[(len(bits) - 1) // 2]
    return next(one for one in settings if one.nbits == chosen)
