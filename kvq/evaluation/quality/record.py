"""The results of one cache, as figures for a table, a picture, a gate and a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.metrics import NOT_ESTIMATED, Estimate, TokenScores, bin_means

POSITION_BINS = 8
NeedleAnswer = tuple[float, bool, bool]
"""Depth of a fact, whether the answer about it is exact, and whether it is in full precision."""


@dataclass(frozen=True)
class BatchResult:
    """The results of one cache on one batch of sequences.

    Attributes:
        scores: one number for each predicted token.
        held_bytes: bytes that the cache held after the last token.
        full_precision_bytes: bytes that the same tokens take in full precision.
        errors_by_distance: see `history_errors`.
        bits: effective bits of stored keys and values.
    """

    scores: TokenScores
    held_bytes: int
    full_precision_bytes: int
    errors_by_distance: list[float] | None
    bits: tuple[float | None, float | None]


@dataclass(frozen=True)
class QualityRecord:
    """Quality and memory of one cache on a text.

    Attributes:
        label: its name in the tables.
        settings: the settings that it was made from.
        is_peer: whether it is a cache of transformers.
        perplexity: perplexity with this cache.
        reference_perplexity: perplexity in full precision on the same tokens.
        nll_change: change of the mean negative log-likelihood, in nats a token, with its interval over sequences.
        kl: mean divergence of the next-token distribution, in nats, with its interval over sequences.
        kl_p99: its 99th percentile over tokens.
        top1: share of tokens whose most likely successor is the same.
        kl_by_position: mean divergence in equal runs of positions, oldest first.
        error_by_distance: relative error of the states by distance, nearest first; None for a peer.
        needle_by_depth: share of exact answers for each depth.
        needle: share of exact answers.
        reference_needle: the same in full precision.
        bits_key: effective bits of a stored key element, metadata and slack included; None for a peer.
        bits_value: the same for the values.
        effective_bits: bits of all held memory, window included, for each element of the states.
        held_bytes: bytes held at the end of one sequence.
        full_precision_bytes: bytes of the same tokens in full precision.
        kl_by_sequence: mean divergence of each sequence, for paired comparisons.
        nll_by_sequence: mean negative log-likelihood of each sequence.
        failure: the reason if nothing could be measured; all figures are then nan.
    """

    label: str
    settings: Mapping[str, Any]
    is_peer: bool = False
    perplexity: float = math.nan
    reference_perplexity: float = math.nan
    nll_change: Estimate = NOT_ESTIMATED
    kl: Estimate = NOT_ESTIMATED
    kl_p99: float = math.nan
    top1: float = math.nan
    kl_by_position: Sequence[float] = ()
    error_by_distance: Sequence[float] | None = None
    needle_by_depth: Mapping[str, float] = field(default_factory=dict)
    needle: float = math.nan
    reference_needle: float = math.nan
    bits_key: float | None = None
    bits_value: float | None = None
    effective_bits: float = math.nan
    held_bytes: float = math.nan
    full_precision_bytes: float = math.nan
    kl_by_sequence: Sequence[float] = ()
    nll_by_sequence: Sequence[float] = ()
    failure: str | None = None

    @property
    def ppl_change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def compression(self) -> float:
        """How many times smaller the cache is than full precision, window and slack included."""
        return self.full_precision_bytes / self.held_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON has them: nan becomes None."""
        figures = {**asdict(self), "ppl_change": self.ppl_change, "compression": self.compression}
        return {name: _plain(figure) for name, figure in figures.items()}


def summarize(
    candidate: Candidate, batches: Sequence[BatchResult], needles: Sequence[NeedleAnswer], state_bits: int
) -> QualityRecord:
    """Return the record of one cache from all its batches.

    Args:
        candidate: the cache.
        batches: its results, in the order of the sequences.
        needles: the answer to each question.
        state_bits: bits of one element of the states in full precision.
    """
    scores = TokenScores.concatenate([batch.scores for batch in batches], dim=0)
    rows = len(scores.kl)
    held = sum(batch.held_bytes for batch in batches) / rows
    plain = sum(batch.full_precision_bytes for batch in batches) / rows
    difference = (scores.nll - scores.reference_nll).mean(1)
    distances = [batch.errors_by_distance for batch in batches if batch.errors_by_distance]
    return QualityRecord(
        label=candidate.label,
        settings=candidate.settings,
        is_peer=candidate.is_peer,
        perplexity=math.exp(scores.nll.double().mean()),
        reference_perplexity=math.exp(scores.reference_nll.double().mean()),
        nll_change=Estimate.of_parts(difference),
        kl=Estimate.of_parts(scores.kl.mean(1)),
        kl_p99=_p99(scores.kl),
        top1=float(scores.agreement.mean()),
        kl_by_position=bin_means(scores.kl, POSITION_BINS),
        error_by_distance=torch.tensor(distances).mean(0).tolist() if distances else None,
        needle_by_depth=_rates(needles),
        needle=sum(right for _, right, _ in needles) / len(needles) if needles else math.nan,
        reference_needle=sum(expected for _, _, expected in needles) / len(needles) if needles else math.nan,
        bits_key=batches[0].bits[0],
        bits_value=batches[0].bits[1],
        effective_bits=state_bits * held / plain,
        held_bytes=held,
        full_precision_bytes=plain,
        kl_by_sequence=scores.kl.mean(1).tolist(),
        nll_by_sequence=scores.nll.mean(1).tolist(),
    )


def compare_kl(record: QualityRecord, other: QualityRecord) -> Estimate:
    """Return by how much the divergence of `record` exceeds that of `other` on the same sequences."""
    return Estimate.of_parts(torch.tensor(record.kl_by_sequence) - torch.tensor(other.kl_by_sequence))


def _p99(numbers: torch.Tensor) -> float:
    flat = numbers.flatten()
    return float(flat.kthvalue(max(1, round(0.99 * len(flat)))).values)


def _rates(needles: Sequence[NeedleAnswer]) -> dict[str, float]:
    depths = sorted({depth for depth, _, _ in needles})
    found = {depth: [right for where, right, _ in needles if where == depth] for depth in depths}
    return {f"{depth:g}": sum(rights) / len(rights) for depth, rights in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
