"""How far the next-token distribution from one cache is from that of full precision, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Expected:
    """What full precision predicts after some tokens, computed once and compared with every cache.

    Attributes:
        log_probabilities: float32 `[B, T, V]`.
        probabilities: float32 `[B, T, V]`.
        best: the most likely tokens, int64 `[B, T]`.
        targets: the true tokens, int64 `[B, T]`.
        nll: negative log-likelihood of the true tokens, float32 `[B, T]`, in nats.
    """

    log_probabilities: torch.Tensor
    probabilities: torch.Tensor
    best: torch.Tensor
    targets: torch.Tensor
    nll: torch.Tensor

    @classmethod
    def of_logits(cls, logits: torch.Tensor, targets: torch.Tensor) -> Expected:
        """Take logits `[B, T, V]` of full precision and the true tokens, int64 `[B, T]`."""
        likely = logits.float().log_softmax(-1)
        nll = -likely.gather(-1, targets[..., None])[..., 0]
        return cls(likely, likely.exp(), likely.argmax(-1), targets, nll)


@dataclass(frozen=True)
class TokenScores:
    """One number for each predicted token, float32 `[N, S]`.

    Attributes:
        kl: Kullback-Leibler divergence of full precision from the cache under test, in nats.
        nll: negative log-likelihood of the true token, in nats.
        reference_nll: the same in full precision.
        agreement: 1 where the most likely token is the same, else 0.
    """

    kl: torch.Tensor
    nll: torch.Tensor
    reference_nll: torch.Tensor
    agreement: torch.Tensor

    @classmethod
    def compare(cls, logits: torch.Tensor, expected: Expected) -> TokenScores:
        """Score logits `[B, T, V]` against full precision's predictions of the same tokens; in float32."""
        log_probabilities = logits.float().log_softmax(-1)
        nll = -log_probabilities.gather(-1, expected.targets[..., None])[..., 0]
        agreement = (log_probabilities.argmax(-1) == expected.best).float()
        kl = _diverge(log_probabilities, expected)
        return cls(kl.cpu(), nll.cpu(), expected.nll.cpu(), agreement.cpu())

    def select(self, tokens: torch.Tensor | slice) -> TokenScores:
        """Return the scores of some tokens only, a mask `[S]` or a slice."""
        return TokenScores(*(getattr(self, name)[:, tokens] for name in self.__dataclass_fields__))

    @classmethod
    def concatenate(cls, scores: Sequence[TokenScores], dim: int) -> TokenScores:
        """Concatenate scores of further tokens (`dim=1`) or sequences (`dim=0`)."""
        return cls(*(torch.cat([getattr(one, name) for one in scores], dim=dim) for name in cls.__dataclass_fields__))


def measure_kl(logits: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Return `TokenScores.kl` alone, float32 `[B, T]`, on the CPU."""
    return _diverge(logits.float().log_softmax(-1), expected).cpu()


def _diverge(log_probabilities: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Return the divergence of each token, float32 `[B, T]`; overwrites `log_probabilities` `[B, T, V]`."""
    difference = torch.sub(expected.log_probabilities, log_probabilities, out=log_probabilities)
    return difference.mul_(expected.probabilities).sum(-1).clamp_min(0)


@dataclass(frozen=True)
class Estimate:
    """A figure over independent parts, with the half-width of its 95 % interval (nan for a single part)."""

    mean: float
    half_width: float

    @classmethod
    def of_parts(cls, parts: torch.Tensor) -> Estimate:
        """Estimate a mean from one number for each part, float `[N]`, by Student's t."""
        count = len(parts)
        if count < 2:
            return cls(float(parts.mean()), math.nan)
        return cls(float(parts.mean()), student_quantile(count - 1) * float(parts.double().std()) / math.sqrt(count))

    def __str__(self) -> str:
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.0e}"
        return f"{self.mean:.2e}{spread}"

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


NOT_ESTIMATED = Estimate(math.nan, math.nan)


def student_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t; beyond 10 degrees of freedom within 0.1 %."""
    return _T_95[degrees - 1] if degrees <= len(_T_95) else 1.96 + 2.37 / degrees + 2.8 / degrees**2


def quantile(numbers: torch.Tensor, share: float) -> float:
    """Return the number that `share` of all numbers do not exceed; the nearest rank, so one that was measured."""
    flat = numbers.flatten()
    return float(flat.kthvalue(nearest_rank(len(flat), share)).values)


def nearest_rank(count: int, share: float) -> int:
    """Return the place, from 1 on, of the smallest of `count` numbers that `share` of them do not exceed."""
    return max(1, min(count, math.ceil(share * count - 1e-9)))


def bin_means(scores: torch.Tensor, bins: int) -> list[float]:
    """Return the mean of `scores` `[N, S]` in each of `bins` equal runs of positions."""
    return [float(run.mean()) for run in scores.tensor_split(bins, dim=1) if run.numel()]
