"""The facts by which a kernel may choose its code, listed once: those of a call, and those of the sides of a layer.

A layer remembers its choice of a kernel for each `RequestKind`: what its sides are does not change. A kernel is
verified for each `RequestKind` without sizes, together with the `SideKind` of keys and values.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.side import SideView


# Named tuples, not dataclasses: one is made in every layer at every step, and hashed.
class RequestKind(NamedTuple):
    """What may differ from call to call of one layer.

    Attributes:
        device: where the query lives.
        dtype: the query's dtype.
        shape: the query's shape `[B, Hq, Tq, D]`; without sizes the queries per head, and 1 or 2 for one or several Tq.
        mask_dtype: the mask's dtype, or None where there is none.
        mask_heads: 1 where all heads share a mask `[B, 1, Tq, Tk]`, 2 where each has its own, else 0.
        is_causal: as in the request.
        has_softcap: whether scores are capped.
        has_sink_logits: whether each head has a logit without a value.
        is_reordered: whether the batch is in another order than in some chunk.
        store_device: where the chunks lie, or None where nothing is stored.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    mask_dtype: torch.dtype | None
    mask_heads: int
    is_causal: bool
    has_softcap: bool
    has_sink_logits: bool
    is_reordered: bool
    store_device: torch.device | None

    def without_sizes(self, heads: int) -> RequestKind:
        """Return the kind, with the facts that select the code instead of the shape; `heads` is H."""
        _, query_heads, queries, _ = self.shape
        return RequestKind(self.device, self.dtype, (query_heads // heads, min(queries, 2)), *self[3:])


class SideKind(NamedTuple):
    """The facts of one side that do not change while its layer holds tokens.

    Attributes:
        dtype: the states' dtype.
        head_dim: D of the side.
        has_sinks: whether sinks are laid over the store.
        is_padded: whether the rows of the batch start at different positions.
        storage: what the quantizer stores: its `PackedFormat`, or its class, block length and parts.
    """

    dtype: torch.dtype
    head_dim: int
    has_sinks: bool
    is_padded: bool
    storage: Hashable

    @classmethod
    def of(cls, side: SideView) -> SideKind:
        """Return the kind of a side."""
        sinks, like = side.sinks, side.like
        is_padded = len(set(sinks.starts)) > 1
        return cls(like.dtype, like.shape[3], sinks.states is not None, is_padded, _storage(side.store.codec))


def _storage(quantizer: Quantizer) -> Hashable:
    packed = find_packed_format(quantizer)
    if packed is not None:
        return packed
    parts = sorted((name, tuple(part.shape), str(part.dtype)) for name, part in quantizer.layout().items())
    kind = type(quantizer), getattr(quantizer, "kind", None)  # the same one is rotated by another wrapper
    return kind, quantizer.block_length, tuple(parts)
