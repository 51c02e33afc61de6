"""The configuration of a cache: the fields that users write, checked as a whole, and the settings of each layer."""

from kvq.config.cache_config import DEFAULT_BACKEND, KVQCacheConfig
from kvq.config.field_types import KeyValue
from kvq.config.layer_config import LayerConfig
from kvq.config.presets import PRESETS
from kvq.config.resolved import ResolvedLayer, ResolvedSide

__all__ = ["DEFAULT_BACKEND", "PRESETS", "KVQCacheConfig", "KeyValue", "LayerConfig", "ResolvedLayer", "ResolvedSide"]
