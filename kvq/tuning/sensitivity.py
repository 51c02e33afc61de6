"""What each setting of each side of each group of layers costs alone: everything else stays in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from kvq.plugin_api.quantizer import Side
from kvq.tuning.calibration import CalibrationText
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.side_setting import Assignment, Pair, SideSetting


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


def list_probes(space: SearchSpace) -> list[Probe]:
    """Return all probes, those of a group of layers one after another."""
    found: list[Probe] = []
    for group in space.groups:
        found += [Probe(group, "key", setting) for setting in space.keys]
        found += [Probe(group, "value", setting) for setting in space.values]
    return found


def measure_probes(probes: Sequence[Probe], text: CalibrationText) -> list[torch.Tensor]:
    """Return the divergences `[N, S]` of each probe.

    Args:
        probes: the probes, those of a group of layers one after another.
        text: measures them.
    """
    found: list[torch.Tensor] = []
    for layers, group in groupby(probes, key=lambda probe: probe.layers):
        found += text.measure([probe.assignment for probe in group], f"layer {layers[0]}")
    return found
