"""Which setting of an engine is nearest to a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from kvq.errors import EvaluationError
from kvq.exporting.engine import Engine, EngineSetting


@dataclass(frozen=True)
class Wanted:
    """What a configuration stores, as far as an engine's setting can be near to it.

    Attributes:
        key_bits: stored bits of an element of the keys, metadata included, a mean over the quantized layers.
        value_bits: the same of the values.
        head_dim: elements of one head.
    """

    key_bits: float
    value_bits: float
    head_dim: int


def choose_nearest(engine: Engine, wanted: Wanted) -> EngineSetting:
    """Return the setting whose bits are nearest: the least sum of both sides' differences; of equals the larger.

    Raises:
        EvaluationError: the engine can store no heads of that size.
    """
    fitting = [setting for setting in engine.settings if setting.fits(wanted.head_dim)]
    if not fitting:
        raise EvaluationError(
            f"{engine.name} has no setting for heads of {wanted.head_dim} elements; its groups do not divide them"
        )
    return min(fitting, key=lambda setting: _distance(setting, wanted))


def _distance(setting: EngineSetting, wanted: Wanted) -> tuple[float, float]:
    keys, values = setting.key.bits(wanted.head_dim), setting.value.bits(wanted.head_dim)
    return round(abs(keys - wanted.key_bits) + abs(values - wanted.value_bits), 6), -(keys + values)
