"""A cache whose layers can drop tokens, and where a model goes on behind them."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kvq.errors import CacheStateError
from kvq.layers.quantized_layer import KVQLayer


class Evictable(Cache):
    """A cache from whose quantized layers tokens can be dropped."""

    def evict(self, layer_idx: int, keep: torch.Tensor) -> None:
        """Forget all tokens of one layer but those named, in every row and head equally many.

        Keys carry the positions at which they came (RoPE is applied before a cache sees them), so the tokens that stay
        are attended to as before. What changes is the length: `get_seq_length` and masks count the tokens that stay, of
        layer 0 as transformers asks for that one. So a forward that goes on is given its positions,
        `position_ids=torch.arange(cache.next_position, ...)`, and, where it is given a mask, one of the tokens that
        stay. Within one `generate`, which counts its positions itself, nothing is needed; one that goes on is given the
        new tokens alone, and the mask of all that came and of these. Layers that keep unequally many take one token at
        a time without a mask.

        The stored blocks before the first token that goes stay bit for bit, and tokens of the window stay exact.
        Behind it, blocks of 64 tokens close up, and their tokens are quantized once more. Groups of affine backends
        along a token find nearly the codes that they had, however often; groups along a channel meet other
        neighbours, and each eviction adds about as much error as quantizing once (docs/method.md has figures). So evict
        much and seldom, or group per token.

        Of layers that slide, tokens of the window are dropped. It counts those that stay from then on, and what came
        before it stays forgotten.

        The same happens where keys and then values of a layer are assigned, `cache.layers[i].keys = ...`, as kvpress
        does.

        Args:
            layer_idx: index of the layer.
            keep: whole numbers `[K]`, `[B, K]` or `[B, H, K]`, positions from the first token that `materialize` shows,
                in any order; or a boolean mask `[T]`, `[B, T]` or `[B, H, T]`, True for tokens that stay. Left padding
                stays.

        Raises:
            CacheStateError: the layer holds nothing, is transformers', or attends in chunks of which one has passed.
            StatesError: `keep` does not fit; the cache is then as it was.
        """
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if not isinstance(layer, KVQLayer):
            kind = "does not exist" if layer is None else f"is a {type(layer).__name__}, which kvq does not change"
            raise CacheStateError(f"layer {layer_idx} {kind}; tokens can be evicted from quantized layers")
        layer.evict(keep)

    @property
    def next_position(self) -> int:
        """The position of the token that comes next: all tokens count that came, those that were evicted too."""
        seen = [layer.seen_length for layer in self.layers if isinstance(layer, KVQLayer)]
        held: int = self.get_seq_length()
        return max([held, *seen])

    def _check_evictions(self, tokens_to_remove: int) -> None:
        """Check that a crop does not reach the tokens between which some were evicted."""
        own = [layer for layer in self.layers if isinstance(layer, KVQLayer) and layer.firm_length]
        left = min((layer.get_seq_length() - layer.firm_length for layer in own), default=-tokens_to_remove)
        if -tokens_to_remove > left:
            raise CacheStateError(
                f"crop({tokens_to_remove}): tokens were evicted from layers {[layer.layer_idx for layer in own]}, and "
                f"only the newest {left} came after them all; "
                "cache.snapshot() before evict, and cache.restore(snapshot), go back further"
            )
