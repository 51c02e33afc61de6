"""The answer of tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvq.config import KVQCacheConfig
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.record import QualityRecord
from kvq.planning import CachePlan
from kvq.plugin_api.quantizer import Side
from kvq.tuning.sensitivity import Probe, Sensitivity
from kvq.tuning.side_setting import Assignment, SideSetting
from kvq.tuning.tuning_plan import TuningPlan


@dataclass(frozen=True)
class Point:
    """One configuration, with its size and its divergence on the calibration text.

    Attributes:
        config: the configuration.
        assignment: the settings of each quantized layer.
        num_bytes: bytes of the whole cache at the goal's context.
        bits: the same for each element of the states.
        predicted: divergence by the sum of single effects, in nats.
        measured: divergence of the whole cache, in nats.
    """

    config: KVQCacheConfig
    assignment: Assignment
    num_bytes: int
    bits: float
    predicted: float
    measured: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        figures = {"bytes": self.num_bytes, "bits": self.bits, "predicted": self.predicted, "measured": self.measured}
        return {**figures, "config": self.config.to_dict()}


@dataclass(frozen=True)
class TunedCache:
    """The answer.

    Attributes:
        plan: what was tuned.
        tuned: the configuration that was chosen.
        uniforms: the best ones with the same settings in all layers within the budget, by the calibration text.
        before: the divergence before settings were exchanged between layers.
        tries: whole configurations that were measured for that.
        exchanges: how many exchanges were kept.
        sensitivities: what every setting costs alone that was worth measuring.
        front: configurations along the whole range, smallest first.
        memory: the plan of the cache at the goal's context.
        held_out: how the held-out text was read.
        records: what was measured there: of the tuned configuration, then of the uniform ones.
        weight_norms: norms of the key and value projections, by layer.
        skips: whether probes could leave out the layers before theirs.
        warnings: reasons to mistrust the answer.
    """

    plan: TuningPlan
    tuned: Point
    uniforms: Sequence[Point]
    before: float
    tries: int
    exchanges: int
    sensitivities: Sequence[Sensitivity]
    front: Sequence[Point]
    memory: CachePlan
    held_out: EvaluationPlan
    records: Sequence[QualityRecord]
    weight_norms: Mapping[int, tuple[float, float]]
    skips: bool
    warnings: tuple[str, ...] = ()

    @property
    def uniform(self) -> tuple[Point, QualityRecord] | None:
        """The uniform configuration that is best on the held-out text, and what was measured there; None without any.

        That text chooses between them, which favours them: the tuned one was chosen without it.
        """
        measured = zip(self.uniforms, self.records[1:], strict=True)
        return min(measured, key=lambda one: one[1].kl.mean, default=None)

    @property
    def config(self) -> KVQCacheConfig:
        """The configuration that was chosen."""
        return self.tuned.config

    def single_effect(self, layers: tuple[int, ...], side: Side, setting: SideSetting | None) -> float:
        """Return what a setting of a group of layers costs alone; 0 in full precision, NaN if it was not measured."""
        if setting is None:
            return 0.0
        probe = Probe(layers, side, setting)
        return next((one.kl for one in self.sensitivities if one.probe == probe), math.nan)


def name_uniform(point: Point) -> str:
    """Return a short name for a configuration with the same settings in all layers, such as `K4V2`."""
    pair = next(iter(point.assignment.values()))
    keys, values = pair.key, pair.value
    if keys is None or values is None:
        return str(pair)
    name = f"K{keys.nbits:g}V{values.nbits:g}"
    alike = replace(keys, nbits=0) == replace(values, nbits=0)
    return f"{name} {str(replace(keys, nbits=0)).replace(' 0 bit', '')}" if alike else f"{name} ({pair})"
