"""How far the next-token distribution from one cache is from that of full precision, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom."""


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
    def compare(cls, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        """Score logits `[B, T, V]` against those of full precision on the true tokens, int64 `[B, T]`."""
        log_probabilities, expected = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        kl = functional.kl_div(log_probabilities, expected, log_target=True, reduction="none").sum(-1)
        pick = targets[..., None]
        return cls(
            kl=kl.clamp_min(0).cpu(),
            nll=-log_probabilities.gather(-1, pick)[..., 0].cpu(),
            reference_nll=-expected.gather(-1, pick)[..., 0].cpu(),
            agreement=(log_probabilities.argmax(-1) == expected.argmax(-1)).float().cpu(),
        )

    def select(self, tokens: torch.Tensor) -> TokenScores:
        """Return the scores of some tokens only, a mask `[S]`."""
        return TokenScores(*(getattr(self, name)[:, tokens] for name in self.__dataclass_fields__))

    @classmethod
    def concatenate(cls, scores: Sequence[TokenScores], dim: int) -> TokenScores:
        """Concatenate scores of further tokens (`dim=1`) or sequences (`dim=0`)."""
        return cls(*(torch.cat([getattr(one, name) for one in scores], dim=dim) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Estimate:
    """A mean over independent parts, with the half-width of its 95 % interval (nan for a single part)."""

    mean: float
    half_width: float

    @classmethod
    def of_parts(cls, parts: torch.Tensor) -> Estimate:
        """Estimate from one number for each part, float `[N]`, by Student's t."""
        count = len(parts)
        if count < 2:
            return cls(float(parts.mean()), math.nan)
        quantile = _T_95[count - 2] if count - 2 < len(_T_95) else 1.96 + 2.37 / (count - 1) + 2.8 / (count - 1) ** 2
        return cls(float(parts.mean()), quantile * float(parts.double().std()) / math.sqrt(count))

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


def bin_means(scores: torch.Tensor, bins: int) -> list[float]:
    """Return the mean of `scores` `[N, S]` in each of `bins` equal runs of positions."""
    return [float(run.mean()) for run in scores.tensor_split(bins, dim=1) if run.numel()]
