"""The hint that a cache is read by another attention than ours, and how to suppress it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from kvq.attention import ATTENTION_NAME

_LOG = logging.getLogger("kvq")

_is_suppressed = ContextVar("kvq_hint_is_suppressed", default=False)


def hint_at_attention(active: str) -> None:
    """Log, once for each name, that a quantized cache is used under another attention implementation than ours."""
    if not _is_suppressed.get():
        _log_once(active)


@contextmanager
def without_hint() -> Iterator[None]:
    """Suppress the hint inside the block, in this thread, where another attention is used on purpose."""
    token = _is_suppressed.set(True)
    try:
        yield
    finally:
        _is_suppressed.reset(token)


def forget_hints() -> None:
    """Log each hint again at its next occasion."""
    _log_once.cache_clear()


@cache
def _log_once(active: str) -> None:
    _LOG.warning(
        "a KVQ cache under attn_implementation=%r is dequantized as a whole at every step; "
        "model.set_attn_implementation(%r) reads it packed, which is faster and needs no copy",
        active,
        ATTENTION_NAME,
    )
