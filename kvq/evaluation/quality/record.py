"""The results of one cache, as figures for a table, a picture, a gate and a JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.free_running import Divergence
from kvq.evaluation.quality.jackknife import WithoutEach, half_width, means_without_each
from kvq.evaluation.quality.metrics import NOT_ESTIMATED, Estimate, TokenScores, bin_means, quantile
from kvq.evaluation.quality.needle import NeedleScore

POSITION_BINS = 8
DEPTH_RANGES = 4
"""Runs of positions that all figures are told for; fewer than `POSITION_BINS`, as a quantile needs many tokens."""
KL_QUANTILES = {"kl_p50": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}
NeedleAnswer = tuple[NeedleScore, NeedleScore]
"""The answer to a question with a cache, and in full precision."""


@dataclass(frozen=True)
class BatchResult:
    """The results of one cache on one batch of sequences.

    Attributes:
        scores: one number for each predicted token.
        held_bytes: bytes that the cache held after the last token.
        full_precision_bytes: bytes that the same tokens take in full precision.
        errors_by_distance: see `history_errors`.
        bits: effective bits of stored keys and values.
        needles: the answers to this batch's share of the questions.
        divergences: how each continuation differs from that in full precision.
    """

    scores: TokenScores
    held_bytes: int
    full_precision_bytes: int
    errors_by_distance: list[float] | None
    bits: tuple[float | None, float | None]
    needles: Sequence[NeedleAnswer] = ()
    divergences: Sequence[Divergence] = ()


@dataclass(frozen=True)
class DepthFigures:
    """What was measured in one run of positions.

    Attributes:
        first: position of its first token that is scored.
        last: position of its last one.
        kl: mean divergence, in nats, with its interval over the sequences.
        kl_p50: its median over tokens; of a quantile that few tokens decide, the largest is told.
        kl_p99: its 99th percentile.
        kl_p999: its 99.9th percentile.
        top1: share of tokens whose most likely successor is the same.
        perplexity: perplexity with this cache.
        reference_perplexity: the same in full precision.
    """

    first: int
    last: int
    kl: Estimate
    kl_p50: float
    kl_p99: float
    kl_p999: float
    top1: float
    perplexity: float
    reference_perplexity: float


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
        kl_p50: its median over tokens.
        kl_p99: its 99th percentile over tokens.
        kl_p999: its 99.9th percentile over tokens.
        top1: share of tokens whose most likely successor is the same.
        spread: half-widths of the 95 % intervals of `kl_p50`, `kl_p99`, `kl_p999`, `top1` and `ppl_change`; those of
            quantiles are rough.
        by_depth: the figures in equal runs of positions, oldest first.
        kl_by_position: mean divergence in equal runs of positions, oldest first.
        error_by_distance: relative error of the states by distance, nearest first; None for a peer.
        needle_by_depth: share of exact answers for each depth.
        needle: share of exact answers.
        reference_needle: the same in full precision.
        needle_tokens: share of the tokens of the keys that are the most likely ones.
        reference_needle_tokens: the same in full precision.
        needle_log_probability: mean log-probability of a token of the keys, in nats, with its interval over questions.
        reference_needle_log_probability: the same in full precision, without an interval.
        first_difference: lower quartile, median and upper quartile over the greedy continuations of the equal tokens
            before the first that differs; inf where none does.
        unchanged: share of the continuations in which none differs.
        drift: mean normalized Levenshtein distance of the continuations from their first difference on, with its
            interval over them.
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
    kl_p50: float = math.nan
    kl_p99: float = math.nan
    kl_p999: float = math.nan
    top1: float = math.nan
    spread: Mapping[str, float] = field(default_factory=dict)
    by_depth: Sequence[DepthFigures] = ()
    kl_by_position: Sequence[float] = ()
    error_by_distance: Sequence[float] | None = None
    needle_by_depth: Mapping[str, float] = field(default_factory=dict)
    needle: float = math.nan
    reference_needle: float = math.nan
    needle_tokens: float = math.nan
    reference_needle_tokens: float = math.nan
    needle_log_probability: Estimate = NOT_ESTIMATED
    reference_needle_log_probability: float = math.nan
    first_difference: tuple[float, float, float] = (math.nan,) * 3
    unchanged: float = math.nan
    drift: Estimate = NOT_ESTIMATED
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
    candidate: Candidate, batches: Sequence[BatchResult], positions: torch.Tensor, state_bits: int
) -> QualityRecord:
    """Return the record of one cache from all its batches.

    Args:
        candidate: the cache.
        batches: its results, in the order of the sequences.
        positions: position of each scored token in its sequence, int64 `[S]`.
        state_bits: bits of one element of the states in full precision.
    """
    scores = TokenScores.concatenate([batch.scores for batch in batches], dim=0)
    distances = [batch.errors_by_distance for batch in batches if batch.errors_by_distance]
    return QualityRecord(
        label=candidate.label,
        settings=candidate.settings,
        is_peer=candidate.is_peer,
        nll_change=Estimate.of_parts((scores.nll - scores.reference_nll).mean(1)),
        spread=_spread(scores),
        by_depth=list(_by_depth(scores, positions)),
        kl_by_position=bin_means(scores.kl, POSITION_BINS),
        error_by_distance=torch.tensor(distances).mean(0).tolist() if distances else None,
        bits_key=batches[0].bits[0],
        bits_value=batches[0].bits[1],
        kl_by_sequence=scores.kl.mean(1).tolist(),
        nll_by_sequence=scores.nll.mean(1).tolist(),
        **_token_figures(scores),
        **_needle_figures([answer for batch in batches for answer in batch.needles]),
        **_continuation_figures([one for batch in batches for one in batch.divergences]),
        **_sizes(batches, len(scores.kl), state_bits),
    )


def _spread(scores: TokenScores) -> dict[str, float]:
    """Return the half-widths of the figures that no mean over sequences is; nan of a single sequence."""
    without = WithoutEach(scores.kl)
    left_out = {name: without.quantiles(share) for name, share in KL_QUANTILES.items()}
    left_out["top1"] = means_without_each(scores.agreement)
    left_out["ppl_change"] = means_without_each(scores.nll.double() - scores.reference_nll.double()).exp() - 1
    return {name: half_width(figures) for name, figures in left_out.items()}


def _token_figures(scores: TokenScores) -> dict[str, Any]:
    return {
        "perplexity": math.exp(scores.nll.double().mean()),
        "reference_perplexity": math.exp(scores.reference_nll.double().mean()),
        "kl": Estimate.of_parts(scores.kl.mean(1)),
        "top1": float(scores.agreement.mean()),
        **{name: quantile(scores.kl, share) for name, share in KL_QUANTILES.items()},
    }


def _by_depth(scores: TokenScores, positions: torch.Tensor) -> Iterator[DepthFigures]:
    for run in torch.arange(len(positions)).tensor_split(DEPTH_RANGES):
        if len(run):
            some = slice(int(run[0]), int(run[-1]) + 1)
            first, last = positions[some][[0, -1]].tolist()
            yield DepthFigures(first, last, **_token_figures(scores.select(some)))


def _needle_figures(answers: Sequence[NeedleAnswer]) -> dict[str, Any]:
    if not answers:
        return {}
    ours, plain = zip(*answers, strict=True)
    likely = torch.tensor([score.log_probability / score.tokens for score in ours])
    return {
        "needle_by_depth": _rates(ours),
        "needle": sum(score.exact for score in ours) / len(ours),
        "reference_needle": sum(score.exact for score in plain) / len(plain),
        "needle_tokens": sum(score.right for score in ours) / sum(score.tokens for score in ours),
        "reference_needle_tokens": sum(score.right for score in plain) / sum(score.tokens for score in plain),
        "needle_log_probability": Estimate.of_parts(likely),
        "reference_needle_log_probability": sum(one.log_probability / one.tokens for one in plain) / len(plain),
    }


def _continuation_figures(divergences: Sequence[Divergence]) -> dict[str, Any]:
    if not divergences:
        return {}
    places = torch.tensor([one.first_difference for one in divergences])
    return {
        "first_difference": tuple(quantile(places, share) for share in (0.25, 0.5, 0.75)),
        "unchanged": float(places.isinf().double().mean()),
        "drift": Estimate.of_parts(torch.tensor([one.drift for one in divergences])),
    }


def _sizes(batches: Sequence[BatchResult], rows: int, state_bits: int) -> dict[str, Any]:
    held = sum(batch.held_bytes for batch in batches) / rows
    plain = sum(batch.full_precision_bytes for batch in batches) / rows
    return {"held_bytes": held, "full_precision_bytes": plain, "effective_bits": state_bits * held / plain}


def compare_kl(record: QualityRecord, other: QualityRecord) -> Estimate:
    """Return by how much the divergence of `record` exceeds that of `other` on the same sequences."""
    return Estimate.of_parts(torch.tensor(record.kl_by_sequence) - torch.tensor(other.kl_by_sequence))


def judge(difference: Estimate) -> str:
    """Return in a word what a paired difference says: `tie` where its interval has zero, or where there is none."""
    return "worse" if difference.low > 0 else "better" if difference.high < 0 else "tie"


def _rates(scores: Sequence[NeedleScore]) -> dict[str, float]:
    depths = sorted({score.depth for score in scores})
    found = {depth: [score.exact for score in scores if score.depth == depth] for depth in depths}
    return {f"{depth:g}": sum(rights) / len(rights) for depth, rights in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
