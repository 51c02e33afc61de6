"""What a cache will hold, from the configuration of a model alone: no weights, no device."""

from kvq.planning.cache_plan import CachePlan, LayerPlan, SidePlan
from kvq.planning.planner import plan

__all__ = ["CachePlan", "LayerPlan", "SidePlan", "plan"]
