"""Plans: the bytes that a cache will hold, from the configuration of a model alone, without weights or device."""

from kvq.planning.cache_plan import CachePlan, LayerPlan, SidePlan
from kvq.planning.planner import plan

__all__ = ["CachePlan", "LayerPlan", "SidePlan", "plan"]
