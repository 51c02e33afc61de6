"""How many tokens leave the window at once."""

from __future__ import annotations

import math

from kvq.errors import ConfigError, Fault
from kvq.plugin_api.quantizer import Quantizer

MAX_FLUSH_FACTOR = 4
"""Most blocks of the longer side that are flushed together where the block lengths of keys and values differ."""
MIN_FLUSH_LENGTH = 32
"""Fewest tokens that are quantized at once; with fewer a flush would happen at every step."""


def common_flush_length(key: Quantizer, value: Quantizer) -> int:
    """Return how many tokens are quantized at once: whole blocks of both sides.

    Raises:
        ConfigError: the block lengths have so little in common that the window would have to wait for many blocks.
    """
    blocks = key.block_length, value.block_length
    common = math.lcm(*blocks)
    if common > MAX_FLUSH_FACTOR * max(*blocks, MIN_FLUSH_LENGTH):
        problem = (
            f"blocks of {blocks[0]} tokens for the keys and {blocks[1]} for the values fit together only every "
            f"{common} tokens, which would all wait in full precision; choose sizes of which one divides the other"
        )
        raise ConfigError([Fault(("q_group_size",), problem)])
    return common * math.ceil(MIN_FLUSH_LENGTH / common)
