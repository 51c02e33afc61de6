"""Read a text in decode-sized steps: every step reads a history that was stored as in generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.transformers_seams.private_names import pass_cache


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
    for piece in tokens[:, prefill:-1].split(step, dim=1):
        yield model(piece, use_cache=True, **pass_cache(model, cache)).logits
