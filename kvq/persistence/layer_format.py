"""Which module saves and loads a layer of which kind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from kvq.layers.quantized_layer import KVQLayer
from kvq.persistence import plain_layer, quantized_layer
from kvq.persistence.header import LayerHeader


def describe_layer(layer: Any) -> LayerHeader:
    """Return what the header says of a layer."""
    described: LayerHeader = (quantized_layer if isinstance(layer, KVQLayer) else plain_layer).describe(layer)
    return described


def format_of(header: LayerHeader) -> ModuleType:
    """Return the module that knows layers of a kind: `collect`, `prepare`, `count_tokens`, `plan` and `fill`."""
    return quantized_layer if header.kind == "quantized" else plain_layer
