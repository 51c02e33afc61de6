"""A quantized layer of sliding or chunked attention, which forgets the tokens that no later query can see.

Whole chunks of the store are forgotten, so up to a chunk more is held than the window asks for. Attention does not see
these tokens: keys, values and masks have the sizes that transformers' own sliding layer gives them.

Where tokens were evicted, the window counts those that are left, as transformers' masks do. What had been forgotten
before stays so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kvq.config import ResolvedLayer
from kvq.errors import CacheStateError
from kvq.layers.quantized_layer import DEFERRED_LENGTH, KVQLayer
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.store.flush_length import common_flush_length

CHUNKS_OF_WINDOW = 8
"""Chunks of the largest size that a window spans, at least, where it has room for as many flushes."""


def choose_chunk_length(window_length: int, flush_length: int) -> int:
    """Return the tokens of the largest chunk: a flush length times a power of two, an eighth of the window or less.

    Keys and values have chunks of the same tokens, since both count in flush lengths.

    Args:
        window_length: tokens that a query sees, itself too.
        flush_length: tokens that are quantized at once; never fewer.
    """
    flushes = max(1, window_length // (CHUNKS_OF_WINDOW * flush_length))
    return int(flush_length) << (flushes.bit_length() - 1)


class SlidingKVQLayer(KVQLayer):
    """Keys and values of the newest tokens that a window reaches back to, quantized.

    Args:
        layer_idx: index of the layer in the model.
        settings: the configuration of this layer; no more tokens are kept exact than the window reaches back.
        window_length: tokens that a query sees, itself too.
        padding: tokens of left padding in each row, or None where there is none.
        is_chunked: whether attention is chunked, or may be: a query sees those of its chunk of `window_length` tokens.

    Attributes:
        window_length: as given.
        is_chunked: as given.
        refilled_from: tokens that had come before the first one held when some were last evicted.
    """

    is_sliding = True

    def __init__(
        self,
        layer_idx: int,
        settings: ResolvedLayer,
        window_length: int,
        padding: tuple[int, ...] | None = None,
        *,
        is_chunked: bool = False,
    ) -> None:
        exact = min(settings.residual_length, max(0, window_length - 1))
        super().__init__(layer_idx, replace(settings, residual_length=exact), padding)
        self.window_length, self.is_chunked = window_length, is_chunked
        self.refilled_from = 0

    @property
    def chunk_length(self) -> int:
        """Tokens of the largest chunk, which are forgotten together; only after the first update."""
        return choose_chunk_length(self.window_length, self.flush_length)

    @property
    def horizon(self) -> int:
        """Tokens after which everything that generating allocates has been seen once; only after the first update."""
        return self.chunk_length

    @property
    def hidden_length(self) -> int:
        """Tokens held that the next query does not see; transformers' own layer holds all others."""
        return max(0, self.held_length - max(0, self.window_length - 1))

    @property
    def _sliding_window_tensor(self) -> torch.Tensor:
        """The window as `DynamicCache` asks its layers for it, to be built from another cache."""
        return torch.tensor(self.window_length, dtype=torch.long, device="cpu")

    def get_max_length(self) -> int:
        """Return the tokens that a query sees, as transformers' own layer does."""
        return self.window_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward of `query_length` tokens sees."""
        seen = self.get_seq_length()
        offset = max(seen - self.window_length + 1, self.dropped_length)
        return seen - offset + query_length, offset

    def check_crop(self, tokens_to_remove: int) -> None:
        """Check that the tokens are held which the queries after a crop see.

        Args:
            tokens_to_remove: zero or negative.

        Raises:
            CacheStateError: some of them are forgotten.
        """
        if not self.is_initialized or self.dropped_length == self.refilled_from:
            return
        most = self.get_seq_length() - self.window_length + 1 - self.dropped_length
        if -int(tokens_to_remove) > most:
            raise CacheStateError(
                f"crop({int(tokens_to_remove)}): layer {self.layer_idx} slides over {self.window_length} tokens and "
                f"has forgotten what came before them; the newest {max(0, most)} can be removed. Before the tokens "
                "that may have to go, take cache.snapshot(), which cache.restore goes back to from anywhere, or call "
                f"cache.activate_past_recording() for {DEFERRED_LENGTH} tokens and those of the last forward"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as `KVQLayer.crop` does.

        Raises:
            CacheStateError: tokens are forgotten that the next query would see; the layer is then as it was.
            StatesError: the number is positive.
        """
        self.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def evict(self, keep: torch.Tensor) -> None:
        """Forget all tokens but those named, as `KVQLayer.evict` does, of those that the next query sees.

        The window then counts the tokens that are left: it has room for as many more as were dropped.

        Raises:
            CacheStateError: the layer holds nothing, or attention is chunked and a chunk is behind.
            StatesError: `keep` does not fit; the layer is then as it was.
        """
        self._check_chunk()
        super().evict(keep)

    def replace(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Hold these states in the place of those that the next query sees, as `KVQLayer.replace` does.

        Raises:
            CacheStateError: attention is chunked and a chunk is behind, or the layer has slid and would drop nothing.
            StatesError: the states do not fit; the layer is then as it was.
        """
        self._check_chunk()
        if self._has_slid and key_states.shape[2] >= self.window_length - 1:
            self._check_equal(key_states, value_states)
            return
        super().replace(key_states, value_states)
        self.refilled_from = self.dropped_length

    def reset(self) -> None:
        """Forget everything; see `KVQLayer.reset`."""
        super().reset()
        self.refilled_from = 0

    def fork(self) -> KVQLayer:
        """Return an independent layer that shares the present chunks."""
        other = super().fork()
        if isinstance(other, SlidingKVQLayer):
            other.refilled_from = self.refilled_from
        return other

    def begin(self, codecs: Mapping[Side, Quantizer], like: Mapping[Side, torch.Tensor]) -> None:
        """Hold nothing yet, but be ready for states; see `KVQLayer.begin`."""
        flush_length = common_flush_length(codecs["key"], codecs["value"])
        largest = choose_chunk_length(self.window_length, flush_length)
        self._begin(codecs, like, chunk_lengths=(flush_length, largest))

    def emptied(self, settings: ResolvedLayer | None = None, carried: Any = None) -> SlidingKVQLayer:
        """Return an empty layer of this kind; see `KVQLayer.emptied`."""
        del carried
        own = settings or self.settings
        return SlidingKVQLayer(self.layer_idx, own, self.window_length, self.padding, is_chunked=self.is_chunked)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        start = self._leap({"key": key_states, "value": value_states})
        super()._append(key_states[:, :, start:], value_states[:, :, start:])

    def _leap(self, states: Mapping[Side, torch.Tensor]) -> int:
        """Forget all tokens held if no query after this forward sees them; return how many of the new ones none sees.

        They are never quantized, but the first ones of all, from which a quantizer may learn its constants.
        """
        seen, held = self.get_seq_length() + states["key"].shape[2], self.held_length
        first = (seen - self.window_length + 1) // self.flush_length * self.flush_length - self.dropped_length
        if first < max(held, 1) or self.record_past:
            return 0
        if held == self._sides["key"].window.length and not self.dropped_length:
            for name, side in self._sides.items():
                side.append(states[name][:, :, : max(0, self.flush_length - held)], self.flush_length)
        for side in self._sides.values():
            side.leap(first)
        self.kernel_cache.note_rearrangement()
        return first - held

    def _assign(self, name: Side, states: torch.Tensor) -> None:
        self._check_chunk()
        super()._assign(name, states)

    @property
    def _has_slid(self) -> bool:
        """Whether tokens that came are behind the window."""
        return self.get_seq_length() >= self.window_length

    def _check_chunk(self) -> None:
        """Check that dropping tokens does not bring those of the last chunk back into the present one."""
        if self.is_chunked and self._has_slid:
            raise CacheStateError(
                f"layer {self.layer_idx} attends in chunks of {self.window_length} tokens and has passed one, or was "
                "loaded without `model=`, which says whether it does: without some tokens the last chunk would reach "
                "into the present one, so none can be dropped or replaced. A new KVQ made without `model=` holds all"
            )

    def _check_equal(self, *states: torch.Tensor) -> None:
        """Check that states are those that the next query sees, to the bit."""
        self.check_states(*states)
        seen = [held for _, held in self._materialize_sides()]
        if not all(torch.equal(*pair) for pair in zip(states, seen, strict=True)):
            raise CacheStateError(
                f"layer {self.layer_idx} slides over {self.window_length} tokens and has forgotten what came before "
                f"them: the {seen[0].shape[2]} that the next query sees can be replaced by fewer only"
            )

    def _forget_unseen(self, added: int) -> None:
        """Forget the whole chunks that no later query sees, nor one after a crop while the past is recorded.

        Args:
            added: tokens of the last forward.
        """
        seen = self.get_seq_length() - (added + DEFERRED_LENGTH if self.record_past else 0)
        count = self._count_whole(seen - self.window_length + 1 - self.dropped_length)
        if not count:
            return
        for side in self._sides.values():
            side.forget_first(count)
        self.kernel_cache.note_rearrangement()

    def _count_whole(self, limit: int) -> int:
        """Return how many of the first `limit` tokens are whole chunks, of keys and of values."""
        if limit < self.flush_length:
            return 0
        found = {side.store.count_leading(limit) for side in self._sides.values()}
        return found.pop() if len(found) == 1 else self._count_whole(min(found))
