"""The bytes that a layer holds under a pair of settings: those of `kvq.planning`, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Literal

import torch
from transformers import PretrainedConfig

from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.planning.model_outline import outline_model
from kvq.planning.rehearsal import Rehearsal
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.steps import find_steps
from kvq.tuning.side_setting import FULL_PRECISION, Pair, SideSetting, build_config

Moment = Literal["held", "peak"]
"""Held right after the prompt, or the most up to the next flush, on the model's device."""


class LayerBytes:
    """Counts the bytes of single layers after a prompt; each kind of layer is rehearsed once for each pair.

    Args:
        model_config: the model's configuration.
        base: what holds for all layers.
        context: tokens of the prompt.
        dtype: the dtype of the states.
        moment: the bytes to count.

    Raises:
        ModelError: what the model caches is not known from its configuration.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        base: KVQCacheConfig,
        *,
        context: int,
        dtype: torch.dtype,
        moment: Moment = "held",
    ) -> None:
        self._model_config = model_config
        self._base = base
        self._context = context
        self._moment = moment
        self._outline = outline_model(model_config, 1, dtype)
        self._element_bytes = dtype.itemsize
        self._known: dict[tuple[Hashable, Pair], int] = {}
        self._resolved: dict[tuple[Hashable, Pair], Pair] = {}
        plain = [Rehearsal(layer, layer) for layer in self._outline.layers]
        self._kinds = [one.signature for one in plain]

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self._kinds)

    def measure(self, index: int, pair: Pair) -> int:
        """Return the bytes of one layer.

        Raises:
            ConfigError, BackendError: a backend does not take these settings for this layer.
        """
        key = self._kinds[index], pair
        if key not in self._known:
            self._known[key] = self._rehearse(index, pair)
        return self._known[key]

    def resolve(self, index: int, pair: Pair) -> Pair:
        """Return the pair with what `auto` means for one layer, which a later release might see in another way."""
        self.measure(index, pair)
        return self._resolved[self._kinds[index], pair]

    def in_full_precision(self) -> int:
        """Return the bytes of all layers in full precision."""
        return sum(self.measure(index, FULL_PRECISION) for index in range(self.count))

    def bits(self, num_bytes: int) -> float:
        """Return bytes of the whole cache as bits for each element of its states."""
        return 8 * self._element_bytes * num_bytes / self.in_full_precision()

    def bytes_of_bits(self, bits: float) -> int:
        """Return the bytes of the whole cache that so many bits for each element make, rounded down."""
        return int(bits * self.in_full_precision() / (8 * self._element_bytes))

    def _rehearse(self, index: int, pair: Pair) -> int:
        plain = self._outline.layers[index]
        layer = plain
        if pair != FULL_PRECISION:
            layer = KVQ(build_config(self._base, {index: pair}, self.count), model=self._model_config).layers[index]
        one = Rehearsal(layer, plain)
        self._resolved[self._kinds[index], pair] = _resolve(pair, one)
        moments = one.run(self._context, one.horizon if self._moment == "peak" else 1)
        return moments.prompt.total_bytes if self._moment == "held" else moments.peak_bytes


def _resolve(pair: Pair, one: Rehearsal) -> Pair:
    if one.quantized is None:
        return pair
    found = [_resolve_side(getattr(pair, name), side.codec) for name, side in one.quantized.sides()]
    return Pair(*found)


def _resolve_side(setting: SideSetting, quantizer: Quantizer) -> SideSetting:
    rotation, balance, clip = find_steps(quantizer)
    return replace(setting, rotation=rotation, balance=balance, clip="none" if clip == "none" else float(clip))
