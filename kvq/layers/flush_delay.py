"""By how many tokens a layer quantizes later than its neighbours.

Layers that all quantize at the same step make that step many times as long as the others, where a quantizer is slow:
hqq's optimizer takes milliseconds a side. Nothing makes it faster in bulk, since a quantizer whose result depends on
the whole call gets one block in each. So the layers of such a quantizer take turns. Tokens that wait are exact
meanwhile, and blocks hold the same tokens in every layer.
"""

from __future__ import annotations

from functools import cache
from math import gcd

GOLDEN = 0.618
"""The part of a flush length from one layer to the next: turns are spread evenly, however many layers there are."""


@cache
def choose_delay(layer_idx: int, flush_length: int) -> int:
    """Return the delay of a layer in tokens, below the flush length; different for as many layers as it has tokens."""
    step = next(one for one in range(max(1, int(flush_length * GOLDEN)), 0, -1) if gcd(one, flush_length) == 1)
    return layer_idx * step % flush_length
