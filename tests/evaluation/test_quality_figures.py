"""Percentiles, their spread and the figures by depth, against numpy on the same numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.free_running import Divergence
from kvq.evaluation.quality.jackknife import WithoutEach, half_width, means_without_each
from kvq.evaluation.quality.metrics import Estimate, TokenScores, quantile
from kvq.evaluation.quality.needle import NeedleScore
from kvq.evaluation.quality.record import DEPTH_RANGES, BatchResult, judge, summarize

PERCENTILES = {"kl_p50": "0.5", "kl_p99": "0.99", "kl_p999": "0.999"}
ROWS, TOKENS, FIRST = 5, 1200, 128
T_OF_4 = 2.776  # two-sided 95 % quantile of Student's t for four degrees of freedom


def nearest_rank(numbers, share):
    """Return the smallest number that a share of all do not exceed, by exact arithmetic (numpy's rounds the rank)."""
    return np.sort(numbers, axis=None)[math.ceil(Fraction(share) * np.size(numbers)) - 1]


@pytest.fixture(scope="module")
def scores():
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(ROWS, TOKENS, generator=generator).mul(2).exp() * torch.linspace(0.1, 1, TOKENS)
    nll, reference = torch.rand(2, ROWS, TOKENS, generator=generator) * 3
    agreement = (torch.rand(ROWS, TOKENS, generator=generator) < 0.9).float()
    return TokenScores(kl, nll, reference, agreement)


def take_rows(scores, rows):
    return TokenScores(*(getattr(scores, name)[rows] for name in scores.__dataclass_fields__))


@pytest.fixture(scope="module")
def summarized(scores):
    """Return the record of two batches; the last three tokens of each sequence could not be predicted."""
    batches = [
        BatchResult(
            TokenScores(*(getattr(scores, name)[rows] for name in scores.__dataclass_fields__)), 10, 40, None, (4, 2)
        )
        for rows in (slice(3), slice(3, 5))
    ]
    return summarize(Candidate("a", lambda model: None, {}), batches, torch.arange(FIRST, FIRST + TOKENS), 16)


@pytest.mark.parametrize("share", PERCENTILES.values())
@pytest.mark.parametrize("count", [1, 7, 100, 1000, 1001])
def test_a_percentile_is_the_nearest_rank(count, share):
    numbers = np.random.default_rng(count).normal(size=count)
    assert quantile(torch.tensor(numbers), float(share)) == nearest_rank(numbers, share)


def test_all_tokens_of_all_texts_make_the_percentiles(scores, summarized):
    kl = scores.kl.double().numpy()
    for name, share in PERCENTILES.items():
        assert getattr(summarized, name) == nearest_rank(kl, share)
    assert summarized.kl.mean == pytest.approx(kl.mean())
    assert summarized.top1 == pytest.approx(scores.agreement.double().numpy().mean())
    perplexities = np.exp(scores.nll.double().numpy().mean()), np.exp(scores.reference_nll.double().numpy().mean())
    assert (summarized.perplexity, summarized.reference_perplexity) == pytest.approx(perplexities)


def jackknife(numbers, figure):
    """Return the half-width from the standard error over all ways of leaving one row out."""
    left_out = np.array([figure(np.delete(numbers, row, axis=0)) for row in range(len(numbers))])
    error = np.sqrt((len(numbers) - 1) / len(numbers) * ((left_out - left_out.mean()) ** 2).sum())
    return T_OF_4 * error


def test_the_spread_is_that_of_the_jackknife_over_texts(scores, summarized):
    kl, agreement = scores.kl.double().numpy(), scores.agreement.double().numpy()
    for name, share in PERCENTILES.items():
        expected = jackknife(kl, lambda rows, share=share: nearest_rank(rows, share))
        assert summarized.spread[name] == pytest.approx(expected, rel=1e-6)
    assert summarized.spread["top1"] == pytest.approx(jackknife(agreement, np.mean), rel=1e-4)
    both = np.stack([scores.nll.double().numpy(), scores.reference_nll.double().numpy()], axis=1)
    change = jackknife(both, lambda rows: np.exp(rows[:, 0].mean() - rows[:, 1].mean()))
    assert summarized.spread["ppl_change"] == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("share", PERCENTILES.values())
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (5, 40), (7, 501)])
def test_percentiles_without_each_text_are_those_of_the_others(shape, share):
    """Many numbers are equal, one text has the largest ones, and one the smallest."""
    numbers = np.random.default_rng(0).integers(0, 50, size=shape).astype(np.float32)
    numbers[0] += 100
    numbers[-1] -= 100
    found = WithoutEach(torch.from_numpy(numbers)).quantiles(float(share))
    assert found.tolist() == [nearest_rank(np.delete(numbers, row, axis=0), share) for row in range(len(numbers))]


def test_of_a_mean_the_spread_is_that_of_student(scores):
    found = half_width(means_without_each(scores.kl))
    assert found == pytest.approx(Estimate.of_parts(scores.kl.double().mean(1)).half_width)


def test_a_single_text_has_no_spread(scores):
    alone = BatchResult(take_rows(scores, slice(1)), 10, 40, None, (4, 2))
    record = summarize(Candidate("a", lambda model: None, {}), [alone], torch.arange(TOKENS), 16)
    assert set(record.spread) == {*PERCENTILES, "top1", "ppl_change"}
    assert all(math.isnan(spread) for spread in record.spread.values())


class MadeElements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.count += sum(one.numel() for one in made if isinstance(one, torch.Tensor))
        return result


def test_twice_as_many_texts_take_twice_the_work():
    counts = []
    for rows in (20, 40):
        batch = BatchResult(TokenScores(*torch.rand(4, rows, 64)), 10, 40, None, (4, 2))
        with MadeElements() as made:
            summarize(Candidate("a", lambda model: None, {}), [batch], torch.arange(64), 16)
        counts.append(made.count)
    assert counts[1] < 2.1 * counts[0]


def test_every_figure_is_told_by_depth(scores, summarized):
    size = TOKENS // DEPTH_RANGES
    assert len(summarized.by_depth) == DEPTH_RANGES
    for place, run in enumerate(summarized.by_depth):
        columns = slice(place * size, (place + 1) * size)
        kl = scores.kl.double().numpy()[:, columns]
        assert (run.first, run.last) == (FIRST + place * size, FIRST + (place + 1) * size - 1)
        assert run.kl.mean == pytest.approx(kl.mean())
        assert run.kl.half_width == pytest.approx(T_OF_4 * kl.mean(1).std(ddof=1) / np.sqrt(ROWS), rel=1e-4)
        assert [run.kl_p50, run.kl_p99, run.kl_p999] == [nearest_rank(kl, share) for share in PERCENTILES.values()]
        assert run.top1 == pytest.approx(scores.agreement.double().numpy()[:, columns].mean())
        assert run.perplexity == pytest.approx(np.exp(scores.nll.double().numpy()[:, columns].mean()))
        assert run.reference_perplexity == pytest.approx(
            np.exp(scores.reference_nll.double().numpy()[:, columns].mean())
        )


def test_needles_are_counted_by_answer_and_by_token(scores):
    ours = [NeedleScore(0.1, True, 5, 5, -0.5), NeedleScore(0.9, False, 2, 4, -8.0), NeedleScore(0.9, True, 4, 4, -1.0)]
    plain = [
        NeedleScore(0.1, True, 5, 5, -0.1),
        NeedleScore(0.9, True, 4, 4, -0.2),
        NeedleScore(0.9, False, 1, 4, -6.0),
    ]
    batch = BatchResult(scores, 10, 40, None, (None, None), needles=list(zip(ours, plain, strict=True)))
    record = summarize(Candidate("a", lambda model: None, {}), [batch], torch.arange(TOKENS), 16)
    assert (record.needle, record.reference_needle) == (2 / 3, 2 / 3)
    assert (record.needle_tokens, record.reference_needle_tokens) == (11 / 13, 10 / 13)
    assert record.needle_by_depth == {"0.1": 1.0, "0.9": 0.5}
    likely = np.array([-0.1, -2.0, -0.25])
    assert record.needle_log_probability.mean == pytest.approx(likely.mean())
    assert record.needle_log_probability.half_width == pytest.approx(4.303 * likely.std(ddof=1) / np.sqrt(3))
    assert record.reference_needle_log_probability == pytest.approx((-0.02 - 0.05 - 1.5) / 3)


def test_continuations_are_told_by_quartiles(scores):
    divergences = [Divergence(place, drift) for place, drift in ((30, 0.5), (math.inf, 0.0), (10, 0.75), (20, 0.75))]
    batch = BatchResult(scores, 10, 40, None, (None, None), divergences=divergences)
    record = summarize(Candidate("a", lambda model: None, {}), [batch], torch.arange(TOKENS), 16)
    assert record.first_difference == (10, 20, 30)
    assert record.unchanged == 0.25
    assert record.drift.mean == 0.5
    assert record.drift.half_width == pytest.approx(3.182 * np.std([0.5, 0, 0.75, 0.75], ddof=1) / 2)
    never = BatchResult(scores, 10, 40, None, (None, None), divergences=[Divergence(math.inf, 0.0)] * 2)
    record = summarize(Candidate("a", lambda model: None, {}), [never], torch.arange(TOKENS), 16)
    assert record.first_difference == (math.inf,) * 3
    assert record.to_dict()["first_difference"] == [None] * 3


@pytest.mark.parametrize(
    ("mean", "half_width", "word"),
    [(0.2, 0.1, "worse"), (-0.2, 0.1, "better"), (0.2, 0.3, "tie"), (-0.2, 0.2, "tie"), (0.2, math.nan, "tie")],
)
def test_a_difference_within_the_spread_is_a_tie(mean, half_width, word):
    assert judge(Estimate(mean, half_width)) == word
