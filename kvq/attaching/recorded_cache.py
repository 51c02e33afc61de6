"""What stands for a cache in a step that is recorded: states go to steps of its layers at fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvq.attention.entry import READ_OPTIONS
from kvq.attention.full_precision import find_option_beyond
from kvq.attention.step_states import StepStates
from kvq.cache.kvq import KVQ
from kvq.errors import CacheStateError
from kvq.layers.fixed_step import FixedStep

LEAST_ROOM = 1024
"""Tokens that a store may grow by before its step is recorded again, at least."""
ROOM_SHARE = 8
"""Or the store's length by this: programs for tokens that are not there yet are idle."""


class RecordedCache(Cache):
    """Stands for a cache.

    Args:
        cache: the cache.

    Attributes:
        steps: the steps of its layers by their index, each made in the first forward.
    """

    def __init__(self, cache: KVQ) -> None:
        super().__init__(layers=list(cache.layers))
        self.steps: dict[int, FixedStep] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return what takes the query of the layer to its step.

        Args:
            key_states: `[B, H, 1, D_k]`.
            value_states: `[B, H, 1, D_v]`.
            layer_idx: index of the layer.
            *args: not looked at.
            **kwargs: not looked at.
        """
        del args, kwargs
        is_taken = False

        def take_query(query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]) -> torch.Tensor:
            nonlocal is_taken
            if is_taken:
                raise CacheStateError(f"layer {layer_idx}: its keys and values are read twice in a step")
            is_taken = True
            if layer_idx not in self.steps:
                self.steps[layer_idx] = _make_step(self.layers[layer_idx], query, mask, options)
            return self.steps[layer_idx].run(query, key_states, value_states)

        states = StepStates(take_query)
        return states, states

    def check_complete(self) -> None:
        """Check that each layer has a step.

        Raises:
            CacheStateError: a layer has taken no states.
        """
        missing = set(range(len(self.layers))) - set(self.steps)
        if missing:
            raise CacheStateError(f"layer {min(missing)} takes no states in a step")


def _make_step(layer: Any, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]) -> FixedStep:
    beyond = "a mask" if mask is not None else find_option_beyond(READ_OPTIONS, options)
    if beyond is not None or options.get("dropout"):
        raise CacheStateError(f"layer {layer.layer_idx}: attention is given {beyond or 'dropout'}")
    scaling, stored = options.get("scaling"), layer.side("key").store.length
    return FixedStep(
        layer,
        query,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        _room(stored, layer.flush_length),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )


def _room(stored: int, flush_length: int) -> int:
    """Return how many tokens a store of this length gets room for."""
    room = stored + max(LEAST_ROOM, stored // ROOM_SHARE)
    return -(-room // flush_length) * flush_length
