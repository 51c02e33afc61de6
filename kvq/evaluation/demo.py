"""The demo's runs: full precision and every usable backend at five pairs of bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel

from kvq.backend_spec import BackendSpec
from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.evaluation.recall import RecallBatch
from kvq.evaluation.scoring import RecallScore, score_config, score_recall

BIT_PAIRS = ((8, 8), (4, 4), (4, 2), (2, 4), (2, 2))
"""Bits of keys and values that the demo compares."""


@dataclass(frozen=True)
class DemoCase:
    """One row of the demo; full precision where `config` is None."""

    backend: str
    config: KVQCacheConfig | None = None

    @property
    def bits(self) -> str:
        """The bits as the literature writes them, e.g. `K4V2`."""
        return f"K{self.config.nbits_k:g}V{self.config.nbits_v:g}" if self.config else "16 bit"


@dataclass(frozen=True)
class DemoRow:
    """One case and its score."""

    case: DemoCase
    score: RecallScore


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
    """Return the default configuration at these bits; None where the backend lacks the default granularities."""
    with warnings.catch_warnings():
        # K2V4 is compared on purpose; what it costs stands in the table.
        warnings.filterwarnings("ignore", message=".*nbits_k.*below.*nbits_v.*")
        try:
            return KVQCacheConfig(backend=backend, nbits_k=nbits_k, nbits_v=nbits_v)
        except ConfigError:
            return None


def run_cases(model: PreTrainedModel, batch: RecallBatch, cases: Sequence[DemoCase]) -> Iterator[DemoRow]:
    """Score the cases in turn, full precision first; each row comes as soon as it is measured."""
    reference = None
    for case in cases:
        if case.config is None:
            reference = score_recall(model, batch, DynamicCache(config=model.config))
            yield DemoRow(case, reference)
        else:
            yield DemoRow(case, score_config(model, batch, case.config, reference))
