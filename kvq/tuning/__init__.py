"""Fit a cache to a model and a budget: which setting each layer's keys and values get; `kvq tune` is its command."""

from kvq.tuning.answer import Point, TunedCache
from kvq.tuning.goal import Goal
from kvq.tuning.kvtuner import read_kvtuner
from kvq.tuning.search_space import Grid, SearchSpace, default_base, find_quantizable, group_layers, widen_for_biases
from kvq.tuning.side_setting import Pair, SideSetting
from kvq.tuning.tuner import tune
from kvq.tuning.tuning_plan import TuningPlan

__all__ = [
    "Goal",
    "Grid",
    "Pair",
    "Point",
    "SearchSpace",
    "SideSetting",
    "TunedCache",
    "TuningPlan",
    "default_base",
    "find_quantizable",
    "group_layers",
    "read_kvtuner",
    "tune",
    "widen_for_biases",
]
