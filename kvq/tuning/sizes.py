"""Bytes of whole caches from those of their layers, and the options that an allocation chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvq.plugin_api.quantizer import Side
from kvq.tuning.allocation import Choice, Option
from kvq.tuning.layer_bytes import LayerBytes
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.sensitivity import Sensitivity
from kvq.tuning.side_setting import FULL_PRECISION, Assignment, Pair, SideSetting


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

    def options(self, sensitivities: Sequence[Sensitivity]) -> list[list[Option]]:
        """Return the options of each group: all pairs, with their bytes and the sum of what their sides cost alone."""
        costs = _by_side(sensitivities)
        return [
            [Option(pair, size, _cost(costs, group, pair)) for pair, size in own.items()]
            for group, own in zip(self._space.groups, self._groups, strict=True)
        ]


_Costs = Mapping[tuple[tuple[int, ...], Side, SideSetting | None], float]


def _by_side(sensitivities: Sequence[Sensitivity]) -> _Costs:
    return {(one.probe.layers, one.probe.side, one.probe.setting): one.kl for one in sensitivities}


def _cost(costs: _Costs, group: tuple[int, ...], pair: Pair) -> float:
    return costs[group, "key", pair.key] + costs[group, "value", pair.value]
