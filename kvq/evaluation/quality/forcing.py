"""Read a text in decode-sized steps: every step reads a history that was stored as in generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.transformers_seams.private_names import pass_cache


@torch.inference_mode()
def read_on(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Feed the next tokens, int64 `[B, T]`, through a cache and return their logits, float `[B, T, V]`."""
    logits: torch.Tensor = model(tokens, use_cache=True, **pass_cache(model, cache)).logits
    return logits


def read_steps(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache, step: int) -> Iterator[torch.Tensor]:
    """Feed tokens, int64 `[B, T]`, behind what a cache holds and yield the logits of each `step` of them."""
    for piece in tokens.split(step, dim=1):
        yield read_on(model, piece, cache)


@torch.inference_mode()
def force_tokens(
    model: PreTrainedModel, tokens: torch.Tensor, cache: Cache, *, prefill: int, step: int
) -> Iterator[torch.Tensor]:
    """Feed tokens through a cache and yield the model's predictions.

    Args:
        model: a causal model.
        tokens: int64 `[B, L]`, on the model's device.
        cache: an empty cache.
        prefill: tokens of the first forward.
        step: tokens of each later forward.

    Yields:
        Logits of the tokens from position `prefill` on, float `[B, step, V]`: first one position, then step by step.
    """
    output = model(tokens[:, :prefill], use_cache=True, logits_to_keep=1, **pass_cache(model, cache))
    yield output.logits[:, -1:]
    yield from read_steps(model, tokens[:, prefill:-1], cache, step)
