"""The configuration of a cache: what users write, checked as a whole, and what one layer reads of it."""

from kvq.config.cache_config import DEFAULT_BACKEND, KVQCacheConfig
from kvq.config.field_types import KeyValue
from kvq.config.layer_config import LayerConfig
from kvq.config.resolved import ResolvedLayer, ResolvedSide

__all__ = ["DEFAULT_BACKEND", "KVQCacheConfig", "KeyValue", "LayerConfig", "ResolvedLayer", "ResolvedSide"]
