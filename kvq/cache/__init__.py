"""`KVQ`, the cache that `generate` takes, and the cache of encoder-decoder models made of two of its kind."""

from kvq.cache.kvq import KVQ

__all__ = ["KVQ"]
