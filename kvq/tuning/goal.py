"""What a cache is tuned for: a size, or a divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvq.errors import EvaluationError
from kvq.tuning.layer_bytes import LayerBytes, Moment
from kvq.units import format_bytes


@dataclass(frozen=True)
class Goal:
    """One of three goals, after a prompt of some tokens.

    Attributes:
        context: tokens of the prompt.
        bits: most bits for each element of the states, with everything that the cache holds.
        memory_bytes: most bytes of the whole cache, with the room that it opens up to the next flush.
        max_kl: largest divergence of the next token on the calibration text, in nats.
    """

    context: int
    bits: float | None = None
    memory_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = [one for one in (self.bits, self.memory_bytes, self.max_kl) if one is not None]
        if len(given) != 1:
            raise EvaluationError("give one goal: --budget BITS, --memory SIZE or --max-kl NATS")
        if not 0 < given[0] < math.inf:
            raise EvaluationError(f"a goal is a finite number above 0, got {given[0]:g}")

    def __str__(self) -> str:
        if self.bits is not None:
            return f"at most {self.bits:g} bits an element at {self.context:,} tokens"
        if self.memory_bytes is not None:
            return f"at most {format_bytes(self.memory_bytes)} at {self.context:,} tokens"
        return f"a KL divergence of at most {self.max_kl:g}"

    @property
    def moment(self) -> Moment:
        """The bytes that count."""
        return "peak" if self.memory_bytes is not None else "held"

    def most_bytes(self, layer_bytes: LayerBytes) -> int | None:
        """Return the bytes that the cache may have; None where the divergence is the goal."""
        if self.bits is not None:
            return layer_bytes.bytes_of_bits(self.bits)
        return self.memory_bytes

    def check_reachable(self, least: int, layer_bytes: LayerBytes) -> None:
        """Refuse a size below that of the smallest candidate.

        Args:
            least: bytes of the smallest cache that the candidates make.
            layer_bytes: what counts bytes.

        Raises:
            EvaluationError: the goal is below that.
        """
        most = self.most_bytes(layer_bytes)
        if most is None or least <= most:
            return
        if self.bits is not None:
            problem = f"--budget {self.bits:g} is below the smallest candidate, {layer_bytes.bits(least):.2f} bits"
        else:
            problem = f"--memory {format_bytes(most)} is below the smallest candidate, {format_bytes(least)}"
        raise EvaluationError(
            f"{problem}, at --context {self.context}; allow more, fewer --bits, longer groups or fewer kept layers"
        )
