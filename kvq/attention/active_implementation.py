"""Which attention the model of a cache uses, and how a cache that was not told of its model learns of it.

Models hand the keys that `update` returns to their attention function untouched. A cache without a model notes which
keys it returned; where they reach our attention, the module that calls it has the model's configuration. Any other
attention tells nothing. It must not know what a cache is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef
from transformers import PretrainedConfig


class ActiveAttention:
    """Belongs to one cache.

    Args:
        config: the configuration that tells the attention, the model's own object, or None to learn of it.
    """

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        self._config = config
        self._is_told = config is not None

    @property
    def name(self) -> str | None:
        """The attention that is active now, or None where nobody has told of the model yet."""
        return None if self._config is None else getattr(self._config, "_attn_implementation", None)

    def expect(self, keys: torch.Tensor) -> None:
        """Learn from the attention that is given these keys, in this thread and before the next keys; keeps no tensor.

        Does nothing once the model is known.
        """
        if self._config is None:
            _EXPECTED.keys, _EXPECTED.learner = TensorWeakRef(keys), weakref.ref(self)

    def learn(self, config: PretrainedConfig) -> None:
        """Take the configuration of the module that attends, unless one is known already."""
        if self._config is None:
            self._config = config

    def forget(self) -> None:
        """Forget what was learnt; what was told stays."""
        if not self._is_told:
            self._config = None

    def fork(self) -> ActiveAttention:
        """Return one that knows the same and learns by itself."""
        other = ActiveAttention(self._config)
        other._is_told = self._is_told
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveAttention:
        """Return a fork: the configuration stays the model's own."""
        memo[id(self)] = other = self.fork()
        return other


def tell_model(keys: torch.Tensor, config: PretrainedConfig) -> None:
    """Tell the cache that returned these keys, if it waits for them, the configuration of the module that attends."""
    expected, learner = _EXPECTED.keys, _EXPECTED.learner
    if expected is None or learner is None or expected() is not keys:
        return
    _EXPECTED.keys = _EXPECTED.learner = None
    waiting = learner()
    if waiting is not None:
        waiting.learn(config)


class _Expected(threading.local):
    """The keys that a cache without a model returned last in this thread, and what it learns by."""

    keys: TensorWeakRef | None = None
    learner: weakref.ref[ActiveAttention] | None = None


_EXPECTED = _Expected()
