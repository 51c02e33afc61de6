"""A gate: conditions on figures, such as `kl<0.05,top1>0.97`, that decide the exit code."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvq.errors import EvaluationError
from kvq.evaluation.quality.record import QualityRecord

METRICS: Mapping[str, tuple[Callable[[QualityRecord], float], float, float]] = {
    "kl": (lambda record: record.kl.mean, 0, math.inf),
    "kl_p50": (lambda record: record.kl_p50, 0, math.inf),
    "kl_p99": (lambda record: record.kl_p99, 0, math.inf),
    "kl_p999": (lambda record: record.kl_p999, 0, math.inf),
    "top1": (lambda record: record.top1, 0, 1),
    "ppl_change": (lambda record: record.ppl_change, -1, math.inf),
    "needle": (lambda record: record.needle, 0, 1),
    "needle_tokens": (lambda record: record.needle_tokens, 0, 1),
    "needle_log_probability": (lambda record: record.needle_log_probability.mean, -math.inf, 0),
    "first_difference": (lambda record: record.first_difference[1], 0, math.inf),
    "unchanged": (lambda record: record.unchanged, 0, 1),
    "drift": (lambda record: record.drift.mean, 0, 1),
    "effective_bits": (lambda record: record.effective_bits, 0, math.inf),
    "compression": (lambda record: record.compression, 0, math.inf),
    "held_bytes": (lambda record: record.held_bytes, 0, math.inf),
}
"""For each figure: how to read it off a record, and its least and greatest possible value."""

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Condition:
    """One condition of a gate.

    Attributes:
        metric: a name among `METRICS`.
        comparison: `<`, `<=`, `>` or `>=`.
        bound: the number that the figure is compared with.
    """

    metric: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}"

    def is_met(self, record: QualityRecord) -> bool:
        """Return whether a record meets the condition; a figure that was not measured never does."""
        return _COMPARISONS[self.comparison](METRICS[self.metric][0](record), self.bound)

    def describe(self, record: QualityRecord) -> str:
        """Return the condition with the figure that was measured."""
        return f"{self} is not met: {METRICS[self.metric][0](record):.6g}"


def parse_gate(text: str) -> tuple[Condition, ...]:
    """Read conditions that are separated by commas.

    Raises:
        EvaluationError: a part is not a condition, a name is unknown, or nothing could ever meet the bound.
    """
    return tuple(_parse_condition(part.strip()) for part in text.split(","))


def find_failures(record: QualityRecord, gate: tuple[Condition, ...]) -> Iterator[str]:
    """Yield the conditions of a gate that a record does not meet."""
    if record.failure:
        yield record.failure
        return
    yield from (condition.describe(record) for condition in gate if not condition.is_met(record))


def _parse_condition(text: str) -> Condition:
    match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>)\s*([-+.\w]+)", text)
    try:
        name, comparison, bound = match.groups() if match else ("", "", "")
        condition = Condition(name, comparison, float(bound))
    except ValueError:
        condition = None
    if condition is None or math.isnan(condition.bound):
        raise EvaluationError(f"gate: {text!r} is not a condition; write e.g. 'kl<0.05'")
    if condition.metric not in METRICS:
        near = difflib.get_close_matches(condition.metric, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(f"gate: {condition.metric!r} is not measured; choose from {', '.join(METRICS)}{hint}")
    _check_possible(condition)
    return condition


def _check_possible(condition: Condition) -> None:
    _, least, greatest = METRICS[condition.metric]
    compare = _COMPARISONS[condition.comparison]
    if not compare(least, condition.bound) and not compare(greatest, condition.bound):
        raise EvaluationError(
            f"gate: {str(condition)!r} can never be met: {condition.metric} lies between {least:g} and {greatest:g}"
        )
