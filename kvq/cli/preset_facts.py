"""Facts about presets, as plain values that the table, the JSON and the pages are made from.

Heavy: it imports torch, and builds the codec of each side of each preset.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from kvq.cli.sample_block import measure_effective_bits
from kvq.config import PRESETS, KVQCacheConfig

HEAD_DIMS = (64, 128)
"""Elements of one head that effective bits are told for."""
DEFAULT = "defaults"
"""The name of the configuration without a preset among the results."""


def collect_presets() -> dict[str, Any]:
    """Return every preset, the default configuration beside them, and the conditions of the measurement."""
    measured = dict(read_measured())
    kl = measured.pop("kl")
    listed = [_collect(name, KVQCacheConfig(preset=name), kl.get(name)) for name in PRESETS]
    return {
        "presets": listed,
        "default": _collect(None, KVQCacheConfig(), kl.get(DEFAULT)),
        "measured": measured,
    }


@cache
def read_measured() -> dict[str, Any]:
    """Return the conditions of the run whose results are listed, and its mean divergence ("kl") by preset.

    `scripts/preset_tables.py` writes this excerpt of the committed results.
    """
    text = resources.files("kvq.cli").joinpath("measured_presets.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _collect(name: str | None, config: KVQCacheConfig, kl: float | None) -> dict[str, Any]:
    values = config.to_dict()
    fields = {field: values[field] for field in next(iter(PRESETS.values()))}
    return {"name": name, "fields": fields, "effective_bits": _effective_bits(config), "kl": kl}


def _effective_bits(config: KVQCacheConfig) -> dict[str, dict[str, float]]:
    layer = config.for_layer(0)
    return {
        str(dim): {
            "key": measure_effective_bits(layer, "key", dim),
            "value": measure_effective_bits(layer, "value", dim),
        }
        for dim in HEAD_DIMS
    }
