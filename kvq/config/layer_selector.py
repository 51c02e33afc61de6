"""Which layers an entry of `layers` is about: an index, a range, or a number of layers from either end.

It knows numbers only, and must not know the settings of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from kvq.errors import ConfigError, Fault


@dataclass(frozen=True)
class LayerSelector:
    """The layers that one key of `layers` chooses.

    Attributes:
        text: the key as it was written.
        start: the first layer; if it is negative, both ends count from the end of the model.
        stop: one past the last layer; 0 is the end of the model if `start` is negative.
        rank: 0 for an index, 1 for a range, 2 for first and last; the lowest wins.
    """

    text: str
    start: int
    stop: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> LayerSelector:
        """Read an index, `"a-b"`, `"first:N"` or `"last:N"`.

        Raises:
            ValueError: it is none of these.
        """
        if re.fullmatch(r"0|-?[1-9][0-9]*", text):
            return cls(text, int(text), int(text) + 1, rank=0)
        if match := re.fullmatch(r"([0-9]+)-([0-9]+)", text):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise ValueError(f"the range {text!r} is empty; write the lower layer first")
            return cls(text, first, last + 1, rank=1)
        if match := re.fullmatch(r"(first|last):([1-9][0-9]*)", text):
            count = int(match[2])
            return cls(text, 0, count, rank=2) if match[1] == "first" else cls(text, -count, 0, rank=2)
        raise ValueError(f"{text!r} does not choose layers; write an index, 'a-b', 'first:N' or 'last:N'")

    @property
    def counts_from_end(self) -> bool:
        """Whether the number of layers is needed to know which layers are meant."""
        return self.start < 0

    def layers(self, num_layers: int | None) -> range:
        """Return the chosen layers that exist.

        Args:
            num_layers: number of the model's layers; None: it is not known, and every layer exists.

        Raises:
            ConfigError: the layers are counted from the end and `num_layers` is None.
        """
        if not self.counts_from_end:
            return range(self.start, self.stop if num_layers is None else min(self.stop, num_layers))
        if num_layers is None:
            problem = f"{self.text!r} counts from the end, which needs the number of layers; pass `model=`"
            raise ConfigError([Fault(("layers",), problem)])
        return range(max(0, num_layers + self.start), max(0, num_layers + self.stop))

    def certainly_overlaps(self, other: LayerSelector) -> bool:
        """Return whether both choose some layer in every model long enough to have it."""
        if self.counts_from_end is not other.counts_from_end:
            return False
        return max(self.start, other.start) < min(self.stop, other.stop)


def check_overlaps(selectors: Iterable[LayerSelector]) -> None:
    """Refuse entries of one kind that choose the same layer in every model long enough.

    Raises:
        ConfigError: two entries of equal rank overlap.
    """
    faults = [
        Fault(
            (),
            f"{one.text!r} and {other.text!r} both choose layer {max(one.start, other.start)}; entries of one kind may "
            "not overlap (an index beats a range, and a range beats 'first:N' and 'last:N')",
        )
        for one, other in combinations(selectors, 2)
        if one.rank == other.rank and one.certainly_overlaps(other)
    ]
    if faults:
        raise ConfigError(faults)


def find_selector(texts: Iterable[str], layer_idx: int, num_layers: int | None) -> str | None:
    """Return the key of `layers` that decides for one layer: index beats range beats first and last.

    Args:
        texts: the keys of `layers`.
        layer_idx: index of the layer, from 0.
        num_layers: number of the model's layers, or None if it is not known.

    Raises:
        ConfigError: two keys of equal rank choose the layer, a key chooses no layer of a model of that length, or
            `num_layers` is needed and None.
    """
    chosen: list[LayerSelector] = []
    for selector in map(LayerSelector.parse, texts):
        layers = selector.layers(num_layers)
        if not layers:
            problem = f"chooses no layer of a model with {num_layers} layers; take it out or correct it"
            raise ConfigError([Fault(("layers", selector.text), problem)])
        if layer_idx in layers:
            chosen.append(selector)
    chosen.sort(key=lambda selector: selector.rank)
    if len(chosen) > 1 and chosen[0].rank == chosen[1].rank:
        problem = f"{chosen[0].text!r} and {chosen[1].text!r} both choose layer {layer_idx}; keep one of them"
        raise ConfigError([Fault(("layers",), problem)])
    return chosen[0].text if chosen else None
