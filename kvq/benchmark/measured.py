"""The results of one contender under one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvq.benchmark.contenders import Contender
from kvq.benchmark.statistics import Spread, is_tie, ratio


@dataclass
class Measured:
    """Figures of one contender, filled in as they are measured.

    Attributes:
        contender: the cache and the attention that reads it.
        steps_ms: for each round, the milliseconds of a step that does not flush.
        flushes_ms: milliseconds of the steps that flush.
        flush_interval: tokens from one flush to the next; None if it never flushes.
        fill_s: seconds to hand over the history.
        transient_bytes: rise of memory in a step above its level afterwards; None if not measured.
        held_bytes: bytes that the cache holds after the history.
        kernel: name of the kernel that read the packed states; empty if none did.
        relative_error: error of a step against dequantize-then-attend in float32; None if the step does just that.
        failure: the reason if nothing, or nothing more, was measured.
    """

    contender: Contender
    steps_ms: list[float] = field(default_factory=list)
    flushes_ms: list[float] = field(default_factory=list)
    flush_interval: int | None = None
    fill_s: float | None = None
    transient_bytes: int | None = None
    held_bytes: int | None = None
    kernel: str = ""
    relative_error: float | None = None
    failure: str | None = None

    @property
    def step(self) -> Spread | None:
        """Time of a step that does not flush, in milliseconds."""
        return Spread.of(self.steps_ms) if self.steps_ms else None

    @property
    def flush(self) -> Spread | None:
        """Time of a step that flushes, in milliseconds."""
        return Spread.of(self.flushes_ms) if self.flushes_ms else None

    @property
    def amortized_ms(self) -> float | None:
        """Mean time of a step, its share of a flush included: medians, in milliseconds."""
        if self.step is None or self.flush is None or not self.flush_interval:
            return self.step.median if self.step and self.flush_interval is None else None
        return self.step.median + (self.flush.median - self.step.median) / self.flush_interval

    def ratio_to(self, other: Measured) -> Spread | None:
        """Return time over that of `other`, round by round."""
        if not self.steps_ms or len(self.steps_ms) != len(other.steps_ms):
            return None
        return ratio(self.steps_ms, other.steps_ms)

    def to_dict(self, buffer: Measured | None, dynamic: Measured | None = None) -> dict[str, Any]:
        """Return plain values, with the ratios to the buffer and to `DynamicCache` if these were measured."""
        compared = self.ratio_to(buffer) if buffer else None
        to_dynamic = self.ratio_to(dynamic) if dynamic else None
        return {
            "label": self.contender.label,
            "kind": self.contender.kind,
            "attention": self.contender.attention,
            "settings": dict(self.contender.settings),
            "step_ms": _plain(self.step),
            "to_buffer": _plain(compared),
            "is_tie": is_tie(compared) if compared else None,
            "to_dynamic": _plain(to_dynamic),
            "flush_ms": _plain(self.flush),
            "flush_interval": self.flush_interval,
            "amortized_ms": self.amortized_ms,
            "fill_s": self.fill_s,
            "transient_bytes": self.transient_bytes,
            "held_bytes": self.held_bytes,
            "kernel": self.kernel,
            "relative_error": self.relative_error,
            "failure": self.failure,
            "samples_ms": {"step": _rounded(self.steps_ms), "flush": _rounded(self.flushes_ms)},
        }


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return asdict(spread) if spread else None


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
