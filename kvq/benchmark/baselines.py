"""The fastest full precision in plain torch: a preallocated buffer, and attention with packed queries.

Packed: the query heads that share a key-value head become its query tokens. This avoids repeating keys and values, and
SDPA's slow path for grouped queries on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "kvq_benchmark_packed"
"""The name under which transformers knows SDPA with packed queries."""


def packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with packed queries; a prompt, or a mask, goes to transformers' own SDPA.

    Args:
        module: the model's attention module.
        query: `[B, Hq, Tq, D]`.
        key: `[B, H, Tk, D]`.
        value: `[B, H, Tk, D_v]`.
        attention_mask: the mask that `sdpa_mask` made, or None.
        **options: all other arguments of the model.

    Returns:
        The output `[B, Tq, Hq, D_v]`, and None for the weights.
    """
    if query.shape[2] != 1 or attention_mask is not None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    batch, heads, _, dim = query.shape
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], dim)
    mixed = functional.scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return mixed.reshape(batch, 1, heads, value.shape[-1]), None


def register_packed_attention() -> None:
    """Register the attention with transformers."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


class BufferLayer(CacheLayerMixin):
    """Keys and values in one allocation each, made at the first update.

    Args:
        capacity: tokens that fit.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate room for states like these."""
        shape = (*key_states.shape[:2], self.capacity)
        self.keys = key_states.new_empty((*shape, key_states.shape[3]))
        self.values = value_states.new_empty((*shape, value_states.shape[3]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states `[B, H, T, D]` after those held and return views of all."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end].copy_(key_states)
        self.values[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens."""
        self.length += tokens_to_remove

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward of `query_length` tokens sees."""
        return self.length + query_length, 0


def build_buffer_cache(config: PretrainedConfig, capacity: int) -> Cache:
    """Return a cache whose layers have room for `capacity` tokens."""
    return Cache(layers=[BufferLayer(capacity) for _ in range(config.num_hidden_layers)])
