"""One call of attention over a quantized layer, independent of the model that makes it.

It must not know how an answer is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq.attention.dispatch.request_kind import RequestKind, SideKind
from kvq.attention.handle import PackedPair


@dataclass(frozen=True, eq=False)
class AttentionRequest:
    """One call of attention; every kernel that takes it computes the same numbers.

    Attributes:
        query: `[B, Hq, Tq, D_k]`, Hq a multiple of H; any strides, not to be written to.
        pair: keys and values, Tk tokens: sinks laid over the store, then the window, then the states of this forward.
        mask: bool (True: seen) or additive, to be broadcast to `[B, Hq, Tq, Tk]`; or None.
        scaling: factor of the dot products.
        is_causal: where `mask` is None, whether query `i` sees no token behind `Tk - Tq + i`.
        softcap: bound of the scaled dot products, by `softcap * tanh(x / softcap)`; or None.
        sink_logits: `[Hq]`, one more logit in each softmax, to which no value belongs; or None.
    """

    query: torch.Tensor
    pair: PackedPair
    mask: torch.Tensor | None
    scaling: float
    is_causal: bool = True
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None

    @property
    def queries_per_head(self) -> int:
        """Query heads that share a key-value head."""
        return self.query.shape[1] // self.pair.key.like.shape[1]

    @property
    def row_count(self) -> int:
        """Query vectors that read one key-value head of one batch row."""
        return self.queries_per_head * self.query.shape[2]

    @property
    def stored_length(self) -> int:
        """Tokens in the store."""
        return self.pair.key.store.length

    @property
    def common_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds query, keys and values, which may have three of them, as under autocast."""
        states = torch.promote_types(self.pair.key.like.dtype, self.pair.value.like.dtype)
        return torch.promote_types(self.query.dtype, states)

    @property
    def is_reordered(self) -> bool:
        """Whether the rows of the batch are in another order than in some chunk of the store."""
        return self.pair.key.store.is_reordered or self.pair.value.store.is_reordered

    def kind(self) -> RequestKind:
        """Return the facts of this call by which a kernel may choose its code; a layer keeps a choice for each."""
        query, mask = self.query, self.mask
        return RequestKind(
            query.device,
            query.dtype,
            query.shape,
            None if mask is None else mask.dtype,
            0 if mask is None or mask.dim() != 4 else min(mask.shape[1], 2),
            self.is_causal,
            self.softcap is not None,
            self.sink_logits is not None,
            self.is_reordered,
            self.pair.key.store.device,
        )

    def kind_across_layers(self) -> tuple[RequestKind, SideKind, SideKind]:
        """Return all that decides which code of a kernel runs, in any layer: everything but numbers and lengths."""
        kind = self.kind().without_sizes(self.pair.key.like.shape[1])
        return kind, SideKind.of(self.pair.key), SideKind.of(self.pair.value)
