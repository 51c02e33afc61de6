"""How far predictions are from those of full precision, from the states before the model's last projection.

With `d` the differences of the logits and `p` the probabilities of full precision, the divergence is
`log(sum p exp(d)) - sum p d`: two means under `p`. The likeliest tokens hold nearly all of it, so the others are drawn,
and the projection is multiplied for these alone. On SmolLM2, where the whole projection is half of all work, the mean
over 382 tokens came out within 0.3 % where it was above 1e-5; below, the rounding of all logits is the larger error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from kvq.evaluation.quality.metrics import Expected, measure_kl
from kvq.tuning.layer_skipping import replaced_forward

LIKELIEST = 256
"""Tokens of the vocabulary that are counted by themselves."""
DRAWN = 128
"""Tokens that stand for all others."""
SEED = 0
MAX_DIFFERENCE = 1e-3
"""Largest difference, in logits, between a model's predictions and its last projection by itself."""

Judge = Callable[[torch.Tensor], torch.Tensor]
"""Takes what `Head.standing_aside` lets a model return for several caches, `[N * B, T, *]`, the rows of one cache after
those of another; returns the divergences of each token, float32 `[N * B, T]` on the CPU."""


class Head:
    """A model's last projection, or that there is none that could be left out.

    Args:
        model: a causal model.

    Attributes:
        is_left_out: whether judges take the states before the projection; else they take logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self._head = head if type(head) is nn.Linear and head.weight.device == model.device else None
        self._states: torch.Tensor | None = None
        self._is_tried = False
        self.is_left_out = self._head is not None and self._head.weight.shape[0] > LIKELIEST + DRAWN

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note what enters the projection within the block."""
        if self._head is None:
            yield
            return
        handle = self._head.register_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def standing_aside(self) -> Iterator[None]:
        """Let the model return what enters the projection as its logits, where that is of use."""
        if self._head is None or not self.is_left_out:
            yield
            return
        with replaced_forward(self._head, lambda states: states):
            yield

    def make_judge(self, logits: torch.Tensor, targets: torch.Tensor) -> Judge:
        """Return what compares with full precision's predictions.

        Args:
            logits: float `[B, T, V]`, of the forward that was listened to.
            targets: the true tokens, int64 `[B, T]`.
        """
        if not self._is_tried:
            self._is_tried, self.is_left_out = True, self.is_left_out and self._makes(logits)
        if self._head is None or self._states is None or not self.is_left_out:
            return lambda output: _compare(output, logits, targets)
        return _SampledJudge(self._head, self._states, logits)

    def _makes(self, logits: torch.Tensor) -> bool:
        """Return whether nothing follows the projection: no scale, no cap, no tokens that are left out."""
        if self._head is None or self._states is None or self._states.shape[:2] != logits.shape[:2]:
            return False
        return float((self._head(self._states) - logits).abs().max()) <= MAX_DIFFERENCE

    def _note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._states = args[0] if args else None


class _SampledJudge:
    """See the module."""

    def __init__(self, head: nn.Linear, states: torch.Tensor, logits: torch.Tensor) -> None:
        self._head = head
        self._states = states.float()
        self._tokens, self._shares = _draw(logits)

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        batch = len(self._states)
        moved = output.float().unflatten(0, (-1, batch)) - self._states  # [N, B, T, hidden]
        rows = [self._judge_row(moved[:, row], self._tokens[row], self._shares[row]) for row in range(batch)]
        return torch.stack(rows, dim=1).flatten(0, 1).float().cpu()

    def _judge_row(self, moved: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return divergences `[N, T]`."""
        weights = functional.embedding(tokens, self._head.weight).float()  # [T, C, hidden]
        differences = (weights @ moved.permute(1, 2, 0)).double()  # [T, C, N]
        differences -= (shares * differences).sum(1, keepdim=True)
        # The mean is zero now, so this is the mean of exp(d) less 1, without the rounding of large terms that cancel.
        return (shares * (differences.expm1() - differences)).sum(1).log1p().T


def _draw(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens `[B, T, C]` that stand for the vocabulary, and what each counts, float64 `[B, T, C, 1]`."""
    probabilities = logits.float().softmax(-1)
    likely = probabilities.topk(LIKELIEST, dim=-1)
    rest = probabilities.scatter(-1, likely.indices, 0.0)
    generator = torch.Generator(device=logits.device).manual_seed(SEED)
    drawn = torch.multinomial(rest.flatten(0, 1) + 1e-30, DRAWN, replacement=True, generator=generator)
    others = rest.sum(-1, keepdim=True).expand(*rest.shape[:-1], DRAWN) / DRAWN
    shares = torch.cat((likely.values, others), dim=-1).double()[..., None]
    tokens = torch.cat((likely.indices, drawn.view(*rest.shape[:-1], DRAWN)), dim=-1)
    return tokens, shares / shares.sum(-2, keepdim=True)


def _compare(output: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    expected = Expected.of_logits(logits, targets)
    return torch.cat([measure_kl(some, expected) for some in output.split(len(logits))])
