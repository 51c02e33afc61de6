"""Detect the attention implementation of a cache's model from its first forward, where `model=` was not given.

Models hand the keys that `update` returns to their attention function untouched. A cache without a model notes which
keys it returned; where they reach our attention, the module that calls it has the model's configuration. Under any
other attention nothing is detected. It must not know what a cache is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef
from transformers import PretrainedConfig

from kvq.transformers_seams.private_names import read_attention


class AttentionDetector:
    """Belongs to one cache.

    Args:
        config: the configuration that names the attention, the model's own object; None: to be detected.
    """

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        self.config = config
        self._is_given = config is not None

    @property
    def name(self) -> str | None:
        """The attention that is active now, or None where the model is not known yet."""
        return None if self.config is None else read_attention(self.config)

    def expect(self, keys: torch.Tensor) -> None:
        """Learn from the attention that is given these keys, in this thread and before the next keys; keeps no tensor.

        Does nothing once the model is known.
        """
        if self.config is None:
            _EXPECTED.keys, _EXPECTED.detector = TensorWeakRef(keys), weakref.ref(self)

    def learn(self, config: PretrainedConfig) -> None:
        """Take the configuration of the module that attends, unless one is known already."""
        if self.config is None:
            self.config = config

    def forget(self) -> None:
        """Forget the detection; a configuration that was given stays."""
        if not self._is_given:
            self.config = None

    def fork(self) -> AttentionDetector:
        """Return one that knows the same and learns by itself."""
        other = AttentionDetector(self.config)
        other._is_given = self._is_given
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionDetector:
        """Return a fork: the configuration stays the model's own."""
        memo[id(self)] = other = self.fork()
        return other


def report_model(keys: torch.Tensor, config: PretrainedConfig) -> None:
    """Report the configuration of the module that attends to the cache that returned these keys, if it waits for it."""
    expected, expecting = _EXPECTED.keys, _EXPECTED.detector
    if expected is None or expecting is None or expected() is not keys:
        return
    _EXPECTED.keys = _EXPECTED.detector = None
    detector = expecting()
    if detector is not None:
        detector.learn(config)


# Per thread, because nothing but the keys goes from `update` to the attention, and a mark on them would travel on with
# tensors of the model or of transformers' layers.
class _Expected(threading.local):
    """The keys that a cache without a model returned last in this thread, and its detector."""

    keys: TensorWeakRef | None = None
    detector: weakref.ref[AttentionDetector] | None = None


_EXPECTED = _Expected()
