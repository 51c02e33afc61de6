"""The demo's runs: full precision and every usable backend at five pairs of bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel

from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.evaluation.one_thread import one_thread
from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.recall import RecallBatch
from kvq.evaluation.scoring import RecallScore, score_config, score_recall
from kvq.plugin_api.backend_spec import BackendSpec

BIT_PAIRS = ((8, 8), (4, 4), (4, 2), (2, 4), (2, 2))
"""Bits of keys and values that the demo compares."""
QUESTIONS_AT_ONCE = 4
"""Questions in one forward: 28 tokens, far less than the window, which is always exact."""
FULL_PRECISION_BITS = "16 bit"


@dataclass(frozen=True)
class DemoCase:
    """One row of the demo; full precision if `config` is None."""

    backend: str
    config: KVQCacheConfig | None = None

    @property
    def bits(self) -> str:
        """The bits as the literature writes them, e.g. `K4V2`."""
        return f"K{self.config.nbits_k:g}V{self.config.nbits_v:g}" if self.config else FULL_PRECISION_BITS


@dataclass(frozen=True)
class DemoRow:
    """One case and its score."""

    case: DemoCase
    score: RecallScore


@dataclass(frozen=True)
class Comparison:
    """How many more questions one case answers than another.

    Attributes:
        backend: backend of the case, or of both.
        difference: difference as a share of the questions, with its interval over the independently drawn contexts.
    """

    backend: str
    difference: Estimate

    def __str__(self) -> str:
        spread = "" if math.isnan(self.difference.half_width) else f" ± {100 * self.difference.half_width:.1f}"
        return f"{100 * self.difference.mean:+.1f}{spread}"


def list_cases(backends: Sequence[BackendSpec]) -> list[DemoCase]:
    """Return full precision, then every backend at every pair of bits that it has."""
    cases = [DemoCase("full precision")]
    for spec in backends:
        for nbits_k, nbits_v in BIT_PAIRS:
            if {nbits_k, nbits_v} <= set(spec.capabilities.nbits):
                config = build_case_config(spec.name, nbits_k, nbits_v)
                if config is not None:
                    cases.append(DemoCase(spec.name, config))
    return cases


def build_case_config(backend: str, nbits_k: float, nbits_v: float) -> KVQCacheConfig | None:
    """Return the default configuration at these bits; None if the backend lacks the default granularities."""
    with warnings.catch_warnings():
        # K2V4 is compared on purpose; the table shows its cost.
        warnings.filterwarnings("ignore", message=".*nbits_k.*below.*nbits_v.*")
        try:
            return KVQCacheConfig(backend=backend, nbits_k=nbits_k, nbits_v=nbits_v)
        except ConfigError:
            return None


def run_cases(model: PreTrainedModel, batch: RecallBatch, cases: Sequence[DemoCase]) -> Iterator[DemoRow]:
    """Score the cases in turn, full precision first; each row comes as soon as it is measured."""
    reference = None
    for case in cases:
        with one_thread():
            score = _score(model, batch, case, reference)
        reference = reference or score
        yield DemoRow(case, score)


def _score(model: PreTrainedModel, batch: RecallBatch, case: DemoCase, reference: RecallScore | None) -> RecallScore:
    if case.config is None:
        return score_recall(model, batch, DynamicCache(config=model.config), at_once=QUESTIONS_AT_ONCE)
    return score_config(model, batch, case.config, reference, at_once=QUESTIONS_AT_ONCE)


def compare_bits(rows: Sequence[DemoRow], bits: str, others: str) -> list[Comparison]:
    """Compare two pairs of bits of each backend that has both, context by context.

    Args:
        rows: measured rows, on the same questions.
        bits: the pair of bits, such as `K4V2`.
        others: the pair to subtract; `16 bit` is full precision, for every backend.
    """
    found = {(row.case.backend, row.case.bits): row.score.exact_by_context for row in rows}
    plain = next((score for (_, own), score in found.items() if own == FULL_PRECISION_BITS), None)
    comparisons = []
    for (backend, own), score in found.items():
        other = plain if others == FULL_PRECISION_BITS else found.get((backend, others))
        if own == bits and other is not None:
            comparisons.append(Comparison(backend, Estimate.of_parts(score - other)))
    return comparisons
