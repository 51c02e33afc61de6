"""What the core does to the states of an affine backend before it rounds them: what `auto` means.

Owns the choice from settings and shape. It must not know how a step is done.
"""

from __future__ import annotations

import math

from kvq.config import ResolvedSide
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.hadamard import hadamard_block
from kvq.plugin_api.quantizer import QuantSpec

LEAST_ROTATION_BLOCK = 16
"""Elements of a transform from which `auto` rotates: a shorter one spreads little."""

CLIP_SHARES = {1: 0.4, 2: 0.85, 3: 0.95}
"""The part of a range that `auto` keeps, by bits of a code; at four bits clipping changes nothing, at more it hurts."""


def is_rotated(chosen: ResolvedSide, spec: QuantSpec) -> bool:
    """Return whether the states of a side are rotated."""
    if chosen.rotation != "auto":
        return chosen.rotation == "hadamard"
    # An offset that all channels share ends in one channel of a transform, where groups inside a token cannot hide it.
    return spec.granularity is Granularity.PER_CHANNEL and hadamard_block(spec.head_dim) >= LEAST_ROTATION_BLOCK


def is_balanced(chosen: ResolvedSide, spec: QuantSpec) -> bool:
    """Return whether each token of a side is divided by a factor of its own."""
    if chosen.balance != "auto":
        return chosen.balance == "rms"
    return spec.granularity is Granularity.PER_CHANNEL


def choose_clip_share(chosen: ResolvedSide, spec: QuantSpec) -> float:
    """Return the part of each group's range that codes are spread over."""
    if isinstance(chosen.clip, float):
        return chosen.clip
    # Without a rotation a group may have an outlier that matters more than all else in it.
    is_suited = chosen.clip == "auto" and spec.granularity is Granularity.PER_CHANNEL and is_rotated(chosen, spec)
    return CLIP_SHARES.get(math.ceil(spec.nbits), 1.0) if is_suited else 1.0
