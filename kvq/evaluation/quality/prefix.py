"""The beginning of a text, read once in full precision for all caches that go on from there.

Within a forward the states of its own tokens are exact, whatever cache they are put into. So caches that read the same
tokens in their first forward are given the same states, and one forward can serve them all.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvq.transformers_seams.private_names import pass_cache

CHUNK = 1024
"""Tokens of one forward: a long text takes no more memory for attention than its chunks do."""


class Prefix:
    """Tokens that full precision has read.

    Args:
        model: a causal model.
        tokens: int64 `[B, T]`, on the model's device.

    Attributes:
        cache: full precision, which holds the tokens. Give other caches the tokens before it reads on.
        logits: predictions after the last token, float `[B, 1, V]`.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self.cache: Cache = DynamicCache(config=model.config)
        for chunk in tokens.split(CHUNK, dim=1):
            self.logits = self._read(chunk, self.cache)

    @torch.inference_mode()
    def give_to(self, cache: Cache) -> None:
        """Let an empty cache hold the tokens, as if they had been its first forward.

        A layer that slides, or carries a sum of its tokens, does not keep the states that another cache would need:
        such a model reads the tokens again.
        """
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            self._read(self._tokens, cache)
            return
        for index, layer in enumerate(self.cache.layers):
            if layer.keys is not None:
                cache.update(layer.keys, layer.values, index)

    def _read(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        output = self._model(tokens, use_cache=True, logits_to_keep=1, **pass_cache(self._model, cache))
        logits: torch.Tensor = output.logits[:, -1:]
        return logits
