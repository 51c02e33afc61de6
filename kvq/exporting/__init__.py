"""The settings of other engines that are nearest to a configuration, what is lost on the way, and their emulation.

An engine's setting is a format of the keys and one of the values, with the arguments that choose them there. The
formats do to states what the engine does to them, so the divergence of a setting can be measured here.
"""

from kvq.exporting.carried_over import CarriedOver, carry_over
from kvq.exporting.emulated_cache import EmulatedCache
from kvq.exporting.engine import ENGINES, Engine, EngineSetting, find_engine

__all__ = [
    "ENGINES",
    "CarriedOver",
    "EmulatedCache",
    "Engine",
    "EngineSetting",
    "carry_over",
    "find_engine",
]
