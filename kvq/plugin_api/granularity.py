"""Per-token and per-channel grouping, and the integers by which libraries call them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Granularity(str, Enum):
    """Along which direction of `[B, H, T, D]` the elements of one group lie.

    `PER_TOKEN` groups run along D inside one token, `PER_CHANNEL` groups along T inside one channel.
    """

    PER_TOKEN = "per_token"
    PER_CHANNEL = "per_channel"

    def __str__(self) -> str:
        return self.value


AxisNames = Mapping[int, Granularity]
"""What each integer axis of a library means."""

TRANSFORMERS_AXIS_NAMES: AxisNames = MappingProxyType({0: Granularity.PER_TOKEN, -1: Granularity.PER_CHANNEL})
"""The meaning of `axis_key` and `axis_value` for the default backend of transformers' `QuantizedCache`."""
