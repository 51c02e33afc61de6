"""Where a model's states are seen: keys and values as its cache is given them, queries as its attention is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig, PreTrainedModel

from kvq.attaching.attention_switch import list_configs
from kvq.attention.full_precision import attend_full_precision
from kvq.attention.padding_mask import kvq_mask
from kvq.calibrating.moments import Moments
from kvq.plugin_api.quantizer import Side
from kvq.transformers_seams.private_names import read_attention, restore_attention

ATTENTION_NAME = "kvq-calibrate"
EXACT_TOKENS = 4
"""First tokens of each sequence that are not counted: caches keep them exact, and they are unlike all others."""


class SeenStates:
    """The sums of all layers of one model."""

    def __init__(self) -> None:
        self.sides: dict[tuple[int, Side], Moments] = defaultdict(Moments)
        self.queries: dict[int, Moments] = defaultdict(Moments)

    def see(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Count keys and values `[B, H, T, D]` of whole sequences."""
        self.sides[layer_idx, "key"].add(keys[:, :, EXACT_TOKENS:])
        self.sides[layer_idx, "value"].add(values[:, :, EXACT_TOKENS:])

    def see_query(self, layer_idx: int, query: torch.Tensor, num_heads: int) -> None:
        """Count queries `[B, Hq, T, D]` for the key-value heads that they read."""
        by_head = query[:, :, EXACT_TOKENS:].unflatten(1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)
        self.queries[layer_idx].add(by_head)


class WatchedCache(DynamicCache):
    """A cache in full precision that shows what it is given.

    Args:
        config: the model's.
        seen: counts it.
    """

    def __init__(self, config: PretrainedConfig, seen: SeenStates) -> None:
        super().__init__(config=config)
        self._seen = seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `DynamicCache`, and count the states."""
        self._seen.see(layer_idx, key_states, value_states)
        states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return states


@contextmanager
def queries_seen(model: PreTrainedModel, seen: SeenStates) -> Iterator[None]:
    """Let the attention of a model count its queries; it gets its own attention back at the end."""
    before = [(config, read_attention(config)) for config in list_configs(model)]
    token = _SEEN.set(seen)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        for config, implementation in before:
            restore_attention(config, implementation)
        _SEEN.reset(token)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in full precision, and count the queries of layers that say which they are."""
    seen, layer_idx = _SEEN.get(), getattr(module, "layer_idx", None)
    if seen is not None and isinstance(layer_idx, int):
        seen.see_query(layer_idx, query, key.shape[1])
    return attend_full_precision(module, query, key, value, attention_mask, **options)


_SEEN: ContextVar[SeenStates | None] = ContextVar("seen", default=None)
AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionMaskInterface.register(ATTENTION_NAME, kvq_mask)
