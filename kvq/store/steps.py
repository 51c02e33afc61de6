"""What the core does to states before a quantizer gets them, in the words of the configuration."""

from __future__ import annotations

from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer


def find_steps(quantizer: Quantizer) -> tuple[str, str, str]:
    """Return the words of `rotation_k`, `balance_k` and `clip_k` that hold for a quantizer of a store."""
    packed = find_packed_format(quantizer)
    if packed is None:
        return getattr(quantizer, "rotation_word", "none"), "none", "none"
    share = float(getattr(quantizer, "clip_share", 1.0))
    return packed.rotation, packed.balance, f"{share:g}" if share < 1 else "none"
