"""The beginning of a text, read once in full precision for all caches that go on from there.

Within a forward the states of its own tokens are exact, whatever cache they are put into. So caches that read the same
tokens in their first forward are given the same states, and one forward can serve them all.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvq.transformers_seams.private_names import pass_cache

CHUNK = 1024
"""Tokens of one forward: a long text takes no more memory for attention than its chunks do."""
_GIVEN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that are made of the states given to `update`, and of nothing else."""


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
        recorder = _Recorder(config=model.config)
        for chunk in tokens.split(CHUNK, dim=1):
            self.logits = self._read(chunk, recorder)
        self._passed = recorder.passed
        self.cache: Cache = DynamicCache(config=model.config)
        self.cache.layers = recorder.layers

    @torch.inference_mode()
    def give_to(self, cache: Cache) -> None:
        """Let an empty cache hold the tokens, as if they had been its first forward.

        Chunks would not do: a cache that quantizes would read the earlier ones from codes. A layer that carries a sum
        of its tokens cannot be given their states, so such a model reads all tokens again, at once.
        """
        found = self.states()
        if found is None:
            self._read(self._tokens, cache)
            return
        for index, states in enumerate(found):
            if states is not None:
                cache.update(*states, index)

    def states(self) -> list[tuple[torch.Tensor, torch.Tensor] | None] | None:
        """Return keys and values of all tokens, `[B, H, T, D]`, in each layer, or None for a layer without any.

        None instead of a list where a layer holds something else; the tensors are those of the cache.
        """
        if any(type(layer) not in _GIVEN for layer in self.cache.layers):
            return None
        return [None if layer.keys is None else self._states(index) for index, layer in enumerate(self.cache.layers)]

    def forget(self) -> None:
        """Drop the states that sliding layers have forgotten: no other cache will be given the tokens."""
        self._passed.clear()

    def _states(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all tokens in one layer."""
        layer = self.cache.layers[index]
        if type(layer) is DynamicLayer:
            return layer.keys, layer.values
        keys, values = zip(*self._passed[index], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _read(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        output = self._model(tokens, use_cache=True, logits_to_keep=1, **pass_cache(self._model, cache))
        logits: torch.Tensor = output.logits[:, -1:]
        return logits


class _Recorder(DynamicCache):
    """Full precision that also keeps the states which its sliding layers forget.

    Attributes:
        passed: by the index of a sliding layer the keys and values of each forward.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.passed: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the states of a sliding layer, and hand them on."""
        if type(self.layers[layer_idx]) is DynamicSlidingWindowLayer:
            self.passed.setdefault(layer_idx, []).append((key_states, value_states))
        states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return states
