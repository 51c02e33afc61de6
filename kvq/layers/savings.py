"""Whether a quantizer saves anything: its effective bits against those of the states, and how long it waits."""

from __future__ import annotations

from kvq.config import ResolvedSide
from kvq.errors import ConfigError, Fault
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Quantizer, QuantSpec
from kvq.store.chunks import GROWTH_DIVISOR
from kvq.user_warnings import warn_user_once

FULL_PRECISION_BITS = 16
"""Effective bits at which quantizing has lost its point."""
LONG_BLOCK = 2048
"""Tokens of a block that are worth a word: all of them wait in full precision before the first is quantized."""


def effective_bits(quantizer: Quantizer, head_dim: int) -> float:
    """Return the stored bits per element, codes and metadata, without slack."""
    block_bytes = sum(part.block_bytes for part in quantizer.layout().values())
    return 8 * block_bytes / (quantizer.block_length * head_dim)


def check_savings(quantizer: Quantizer, chosen: ResolvedSide, spec: QuantSpec, residual_length: int) -> None:
    """Refuse what can never save anything, and warn, once, of what does so seldom.

    Args:
        quantizer: the quantizer, as the store uses it.
        chosen: the configuration of the side.
        spec: the spec that it was built from.
        residual_length: newest tokens that are exact.

    Raises:
        ConfigError: codes and metadata take no less than full precision.
    """
    bits = effective_bits(quantizer, spec.head_dim)
    said = f"{chosen.group_size} gives {bits:.1f} effective bits for the {spec.side}s at head_dim={spec.head_dim}"
    if bits >= FULL_PRECISION_BITS:
        problem = f"{said}, no less than full precision; choose {_way_to_fewer_bits(chosen, spec.head_dim)}"
        raise ConfigError([Fault(("q_group_size",), problem)])
    most, plain = bits * (1 + 1 / GROWTH_DIVISOR), 8 * spec.states_dtype.itemsize
    if most >= plain:
        warn_user_once(
            f"q_group_size: {said}, and up to {most:.1f} with the room that chunks keep for the next tokens; the "
            f"states have {plain}, so little or nothing is saved: choose {_way_to_fewer_bits(chosen, spec.head_dim)}"
        )
    if quantizer.block_length > LONG_BLOCK:
        warn_user_once(
            f"q_group_size: the {spec.side}s are quantized in blocks of {quantizer.block_length:,} tokens ({bits:.1f} "
            f"effective bits); until {quantizer.block_length + residual_length:,} are there all of them wait in full "
            "precision, and nothing is saved; choose smaller groups, such as 64"
        )


def _way_to_fewer_bits(chosen: ResolvedSide, head_dim: int) -> str:
    if chosen.granularity is Granularity.PER_TOKEN and chosen.group_size >= head_dim:
        return "fewer bits or per-channel groups, since per-token groups end with the head"
    return "larger groups or fewer bits"
