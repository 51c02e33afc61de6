"""How one side of a layer may be quantized, and what a layer's two sides make of it in a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kvq.config import KVQCacheConfig


@dataclass(frozen=True)
class SideSetting:
    """One way to quantize the keys or the values of a layer.

    Attributes:
        backend: name of the backend.
        nbits: bits per code.
        axis: `per_token` or `per_channel`.
        group_size: elements per scale.
        rotation: as in a configuration.
        balance: as in a configuration.
        clip: as in a configuration.
        metadata: `metadata_dtype` of a configuration; `default`: what it is where nobody names one.
    """

    backend: str
    nbits: float
    axis: str = "per_channel"
    group_size: int = 64
    rotation: str = "auto"
    balance: str = "auto"
    clip: str | float = "auto"
    metadata: str = "default"

    def __str__(self) -> str:
        named = (("rotation", self.rotation), ("balance", self.balance), ("clip", self.clip))
        steps = [f"{name} {word}" for name, word in named if word != "auto"]
        steps += [f"metadata {self.metadata}"] if self.metadata != "default" else []
        return ", ".join([f"{self.backend} {self.nbits:g} bit {self.axis} by {self.group_size}", *steps])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """The settings of both sides of a layer; None for a side in full precision, which no configuration can say."""

    key: SideSetting | None
    value: SideSetting | None

    @property
    def is_possible(self) -> bool:
        """Whether a configuration can say it: it names one `metadata_dtype` for both sides."""
        return self.key is None or self.value is None or self.key.metadata == self.value.metadata

    def __str__(self) -> str:
        return " / ".join("full precision" if side is None else str(side) for side in (self.key, self.value))

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of a `LayerConfig`; a side in full precision gets those of the other one."""
        key, value = self.key or self.value, self.value or self.key
        if key is None or value is None:
            return {"full_precision": True}
        return {
            "backend": _of_both(key.backend, value.backend),
            "nbits_k": key.nbits,
            "nbits_v": value.nbits,
            "axis_key": key.axis,
            "axis_value": value.axis,
            "q_group_size": _of_both(key.group_size, value.group_size),
            "rotation_k": key.rotation,
            "rotation_v": value.rotation,
            "balance_k": key.balance,
            "balance_v": value.balance,
            "clip_k": key.clip,
            "clip_v": value.clip,
            "metadata_dtype": None if key.metadata == "default" else key.metadata,
        }


FULL_PRECISION = Pair(None, None)
"""A layer that stays as transformers made it."""
Assignment = Mapping[int, Pair]
"""The settings of some layers, by index."""


def build_config(base: KVQCacheConfig, layers: Assignment, count: int) -> KVQCacheConfig:
    """Return the configuration in which some layers are quantized, and the others in full precision.

    Args:
        base: what holds for all layers beside the settings of their sides, such as the window.
        layers: the settings of the layers to quantize.
        count: number of the model's layers.

    Raises:
        ConfigError: a backend does not take these settings.
    """
    pairs = [layers.get(index, FULL_PRECISION) for index in range(count)]
    outer = _choose_outer(pairs)
    shared = outer.to_fields() if outer != FULL_PRECISION else {}
    own = {_name_run(*run): _differing(pair.to_fields(), shared) for pair, run in _list_runs(pairs) if pair != outer}
    fields = {**dict(base), **shared, "layers": own}
    used = {side.backend for pair in layers.values() for side in (pair.key, pair.value) if side is not None}
    fields["backend_options"] = {name: given for name, given in base.backend_options.items() if name in used}
    with fewer_bits_for_keys_allowed():
        return KVQCacheConfig(**fields)


@contextmanager
def fewer_bits_for_keys_allowed() -> Iterator[None]:
    """Keep the warning about keys with fewer bits than values to itself: here it was measured, or is about to be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nbits_k.*below.*nbits_v.*")
        yield


def _choose_outer(pairs: Sequence[Pair]) -> Pair:
    """Return the pair whose settings hold unless a layer names others: the most frequent one that all can differ from.

    A layer cannot take back a `metadata_dtype` of the configuration around it.
    """
    quantized = [pair for pair in _by_frequency(pairs) if pair != FULL_PRECISION]
    plain = [pair for pair in quantized if pair.to_fields()["metadata_dtype"] is None]
    return next(iter([*plain, *quantized]), FULL_PRECISION)


def _by_frequency(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(dict.fromkeys(pairs), key=pairs.count, reverse=True)


def _list_runs(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, tuple[int, int]]]:
    """Yield each run of equal neighbours with its first and last index."""
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or pairs[stop] != pairs[start]:
            yield pairs[start], (start, stop - 1)
            start = stop


def _differing(fields: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in shared or shared[name] != value}


def _name_run(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _of_both(key: Any, value: Any) -> Any:
    return key if key == value else {"key": key, "value": value}


PAIR_FIELDS = tuple(Pair(SideSetting("", 0), SideSetting("", 0)).to_fields())
"""The fields of a configuration that a pair sets."""
