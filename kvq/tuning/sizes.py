"""Bytes of whole caches from those of their layers, and the options that an allocation chooses from."""

from __future__ import annotations

import math

from kvq.tuning.allocation import Choice, Option
from kvq.tuning.costs import CostOf
from kvq.tuning.layer_bytes import LayerBytes
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.sensitivity import Probe, split_pair
from kvq.tuning.side_setting import FULL_PRECISION, Assignment


class Sizes:
    """The bytes of each pair of settings in each group of layers.

    Args:
        space: what may be chosen.
        layer_bytes: counts the bytes of a layer.

    Raises:
        ConfigError, BackendError: a backend does not take a setting for these layers.
    """

    def __init__(self, space: SearchSpace, layer_bytes: LayerBytes) -> None:
        self.layer_bytes = layer_bytes
        self._space = space
        self._groups = [
            {pair: sum(layer_bytes.measure(index, pair) for index in group) for pair in space.pairs}
            for group in space.groups
        ]
        others = set(range(layer_bytes.count)) - set(space.layers)
        self.fixed_bytes = sum(layer_bytes.measure(index, FULL_PRECISION) for index in others)

    @property
    def least_bytes(self) -> int:
        """Bytes of the smallest cache."""
        return self.fixed_bytes + sum(min(own.values()) for own in self._groups)

    def total(self, choice: Choice) -> int:
        """Return the bytes of the whole cache."""
        return self.fixed_bytes + choice.num_bytes

    def assign(self, choice: Choice) -> Assignment:
        """Return the pair of each quantized layer."""
        pairs = zip(self._space.groups, choice.options, strict=True)
        return {index: option.name for group, option in pairs for index in group}

    def options(self, cost_of: CostOf) -> list[list[Option]]:
        """Return the options of each group: all pairs, with their bytes and the sum of what their sides cost alone.

        Args:
            cost_of: returns the cost of one side; a pair with a side of infinite cost is left out.
        """
        costs = [
            {pair: sum(cost_of(probe) for probe in split_pair(group, pair)) for pair in own}
            for group, own in zip(self._space.groups, self._groups, strict=True)
        ]
        return [
            [Option(pair, size, cost[pair]) for pair, size in own.items() if cost[pair] < math.inf]
            for cost, own in zip(costs, self._groups, strict=True)
        ]

    def list_probes(self, choice: Choice) -> list[Probe]:
        """Return the probes of both sides of each group of layers."""
        pairs = zip(self._space.groups, choice.options, strict=True)
        return [probe for group, option in pairs for probe in split_pair(group, option.name)]
