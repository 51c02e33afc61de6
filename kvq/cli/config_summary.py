"""A configuration, with every side of every kind of layer built as a cache would build it.

Heavy: it imports torch, and the library of every backend that the configuration chooses.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq.cli.sample_block import build_sample, runs_here
from kvq.config import KVQCacheConfig, ResolvedLayer, ResolvedSide
from kvq.config.calibration_choice import place_beside
from kvq.config.faults import FaultCollector
from kvq.errors import ConfigError
from kvq.layers.savings import effective_bits
from kvq.plugin_api.quantizer import Side
from kvq.store.steps import find_steps


@dataclass(frozen=True)
class SideSummary:
    """One side of the layers of one entry.

    Attributes:
        layers: the key of the entry in `layers`, or an empty string for the rest.
        side: keys or values.
        settings: its settings; None for layers in full precision.
        effective_bits: stored bits per element; None in full precision, or if the backend takes no device of this
            machine.
        rotation, balance, clip: as the setting says, or what `auto` means for it; empty in full precision.
    """

    layers: str
    side: Side
    settings: ResolvedSide | None
    effective_bits: float | None
    rotation: str = ""
    balance: str = ""
    clip: str = ""


@dataclass(frozen=True)
class ConfigSummary:
    """A configuration without faults.

    Attributes:
        config: the configuration that was read.
        sides: the rest of the layers first, then the entries of `layers` in the order of the file.
        warnings: kvq's warnings while it read the file and built the sides.
    """

    config: KVQCacheConfig
    sides: tuple[SideSummary, ...]
    warnings: tuple[str, ...]


def summarize_mapping(values: Mapping[str, Any], source: str, head_dim: int) -> ConfigSummary:
    """Build a configuration, and the codec of every side.

    Args:
        values: the fields.
        source: the file that they come from.
        head_dim: elements of one head.

    Raises:
        ConfigError: something is wrong; it lists every fault.
        BackendError: the only fault is that a backend is unavailable.
    """
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        config = KVQCacheConfig.from_mapping(place_beside(values, source), source=source)
        sides = _build_sides(config, head_dim, source)
        told = tuple(str(one.message) for one in caught if one.category is UserWarning)
        return ConfigSummary(config, sides, told)


def _build_sides(config: KVQCacheConfig, head_dim: int, source: str) -> tuple[SideSummary, ...]:
    faults = FaultCollector()
    sides: list[SideSummary] = []
    for layers, own in [("", {}), *((text, layer.given) for text, layer in config.layers.items())]:
        resolved = ResolvedLayer.from_fields({**dict(config), **own})
        for side in ("key", "value"):
            with faults.at(*(["layers", layers] if layers else [])):
                sides.append(_build_side(layers, side, resolved, head_dim))
    if faults.faults:
        raise ConfigError(dict.fromkeys(faults.faults), source)
    return tuple(sides)


def _build_side(layers: str, side: Side, resolved: ResolvedLayer, head_dim: int) -> SideSummary:
    if resolved.full_precision:
        return SideSummary(layers, side, None, None)
    settings = resolved.side(side)
    if not runs_here(settings.backend):
        return SideSummary(layers, side, settings, None, settings.rotation, settings.balance, str(settings.clip))
    quantizer = build_sample(resolved, side, head_dim)
    return SideSummary(layers, side, settings, effective_bits(quantizer, head_dim), *find_steps(quantizer))
