"""One quantized layer of a cache, in the shape that transformers expects of a cache layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.handle import PackedPair
from kvq.config import ResolvedLayer
from kvq.errors import CacheStateError, StatesError
from kvq.layers.carrying_layer import CarryingLayer
from kvq.layers.eviction import check_padding_stays, count_equal_ends, find_kept, gather_tokens, gets_other_numbers
from kvq.layers.flush_delay import choose_delay
from kvq.layers.given_states import check_continuity, check_pair, check_states, goes_on
from kvq.layers.quantizer_factory import build_codec
from kvq.layers.store_device import choose_store_device
from kvq.layers.transformers_layers import crop_carried, fork_layer, moved_layer, reset_layer, select_rows
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.store.flush_length import common_flush_length
from kvq.store.read_states import ReadStates
from kvq.store.side import LayerSide
from kvq.store.sinks import SinkTokens
from kvq.user_warnings import warn_user_once

REWRITTEN_OFTEN = (
    "tokens that are stored quantized were moved by evictions or assignments for a second time: groups along a channel "
    "meet other neighbours each time, and are quantized once more with new error, as the vectors of a codebook are. "
    "Drop more tokens at once, or group an affine backend per token (axis_key='per_token', axis_value='per_token'), "
    "where codes are found again"
)
DEFERRED_LENGTH = 256
"""Newest tokens that a crop may still take back without a trace, while the past is recorded: none of them lets older
ones be quantized. Assisted decoding proposes some 20 at a time; a flag that is forgotten costs no more than these."""


class KVQLayer(CarryingLayer):
    """Keys and values of one layer: quantized history, sinks and the newest tokens exact.

    Args:
        layer_idx: index of the layer in the model.
        settings: the configuration of this layer.
        padding: tokens of left padding in each row, or None where there is none.
        carried: an empty layer of transformers that holds what the model's layer has beside keys and values: states of
            linear attention, keys of an indexer. None: it has nothing.

    Attributes:
        flush_delay: tokens by which the layer quantizes later than `residual_length` says; see `choose_delay`.
        evicted_length: tokens that came and were dropped by `evict` or `replace`.
        firm_length: tokens that no crop can take back: between them some were dropped. Behind them stands all that came
            last.
    """

    is_compileable = False
    is_sliding = False

    def __init__(
        self,
        layer_idx: int,
        settings: ResolvedLayer,
        padding: tuple[int, ...] | None = None,
        carried: Any = None,
    ) -> None:
        # CacheLayerMixin's constructor assigns `keys` and `values`, which are computed here.
        self.layer_idx = layer_idx
        self.settings = settings
        self.padding = padding
        self.carried = carried
        self.is_initialized = False
        self.record_past = False
        self.flush_delay = 0
        self.kernel_cache = KernelCache()
        self.evicted_length = self.firm_length = 0
        self._rewritten = 0
        self._sides: dict[Side, LayerSide] = {}
        self._assigned: dict[Side, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer_idx={self.layer_idx}, tokens={self.get_seq_length()})"

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys as fresh full-precision states `[B, H, T, D]`, or None before the first update.

        Nothing can be written to them, which the layer would never see; `materialize` returns a tensor of your own.
        Assigning keys, and values of as many tokens, is `replace`: what kvpress does to drop tokens.
        """
        shown: torch.Tensor | None = self._show("key")
        return shown

    @keys.setter
    def keys(self, states: torch.Tensor) -> None:
        self._assign("key", states)

    @property
    def values(self) -> torch.Tensor | None:
        """All values as fresh full-precision states `[B, H, T, D]`, or None before the first update; see `keys`."""
        shown: torch.Tensor | None = self._show("value")
        return shown

    @values.setter
    def values(self, states: torch.Tensor) -> None:
        self._assign("value", states)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as fresh full-precision tensors `[B, H, T, D]`; only after the first update."""
        self.check_whole()
        return self._materialize("key"), self._materialize("value")

    @property
    def flush_length(self) -> int:
        """Tokens that are quantized at once."""
        return self._sides["key"].flush_length

    def side(self, name: Side) -> LayerSide:
        """Return the keys or the values; only after the first update."""
        return self._sides[name]

    def sides(self) -> Iterator[tuple[Side, LayerSide]]:
        """Iterate over the initialized sides."""
        yield from self._sides.items()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Build quantizers and buffers for states like these."""
        states: dict[Side, torch.Tensor] = {"key": key_states, "value": value_states}
        codecs = {side: build_codec(self.settings, side, self.layer_idx, tensor) for side, tensor in states.items()}
        self.begin(codecs, states)

    def begin(self, codecs: Mapping[Side, Quantizer], like: Mapping[Side, torch.Tensor]) -> None:
        """Hold nothing yet, but be ready for states.

        Args:
            codecs: the quantizers of keys and values.
            like: states like those that will come, `[B, H, T, D]`.
        """
        self._begin(codecs, like, chunk_lengths=None)

    def _begin(
        self,
        codecs: Mapping[Side, Quantizer],
        like: Mapping[Side, torch.Tensor],
        *,
        chunk_lengths: tuple[int, int] | None,
    ) -> None:
        keys = like["key"]
        starts = self.padding or (0,) * keys.shape[0]
        if len(starts) != keys.shape[0]:
            raise StatesError(f"padding is given for {len(starts)} rows, the states have {keys.shape[0]}")
        flush_length = common_flush_length(codecs["key"], codecs["value"])
        sinks = SinkTokens(self.settings.sink_length, starts)
        takes_turns = not all(codec.group_local for codec in codecs.values())
        self.flush_delay = choose_delay(self.layer_idx, flush_length) if takes_turns else 0
        self._sides = {
            side: LayerSide.empty(
                codecs[side],
                states,
                choose_store_device(self.settings.device, states.device),
                flush_length,
                sinks,
                chunk_lengths,
            )
            for side, states in like.items()
        }
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, packed: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states and return all keys and values for the attention of the current forward.

        Args:
            key_states: `[B, H, T, D_k]`, copied.
            value_states: `[B, H, T, D_v]`, copied.
            packed: return handles that the "kvq" attention reads without materializing them.
            *args: ignored; older models pass cache arguments here.
            **kwargs: ignored, for the same reason.

        Returns:
            Keys and values `[B, H, total, D]`. The states of this call come back exact.

        Raises:
            KVQError: the states do not fit; the layer is then as it was before.
        """
        del args, kwargs
        self.check_states(key_states, value_states)
        return self.add(key_states, value_states, packed=packed)

    def add(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *, packed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `update` with states that `check_states` has accepted."""
        was_initialized = self.is_initialized
        self.check_whole()
        if not was_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._sides["key"], self._sides["value"]
        before = keys.contents, values.contents
        views = keys.view(key_states), values.view(value_states)
        hidden = self.hidden_length
        try:
            self._append(key_states, value_states)
        except BaseException:
            keys.contents, values.contents = before
            if not was_initialized:
                self._sides, self.is_initialized = {}, False
            raise
        self.kernel_cache.note_growth()
        self._forget_unseen(key_states.shape[2])
        if packed:
            return PackedPair(*views, self.kernel_cache, outlives=self.record_past, hidden=hidden).handles()
        read = views[0].materialize(), views[1].materialize()
        return (read[0][:, :, hidden:], read[1][:, :, hidden:]) if hidden else read

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put states behind those held, and quantize what leaves the window."""
        deferred = DEFERRED_LENGTH if self.record_past else 0
        flush_count = self._flush_count(self.held_length + key_states.shape[2] - deferred)
        self._sides["key"].append(key_states, flush_count)
        self._sides["value"].append(value_states, flush_count)

    def _forget_unseen(self, added: int) -> None:
        """Forget what no later query sees: nothing here, where each sees all tokens."""

    def get_seq_length(self) -> int:
        """Return the number of tokens that came, without evicted ones."""
        if not self.is_initialized:
            return 0
        return self._sides["key"].contents.seen

    @property
    def held_length(self) -> int:
        """Tokens held."""
        return self._sides["key"].length if self.is_initialized else 0

    @property
    def dropped_length(self) -> int:
        """Tokens that came first and were forgotten, since no query sees them any more."""
        return self._sides["key"].contents.dropped if self.is_initialized else 0

    @property
    def hidden_length(self) -> int:
        """Tokens held that the next query does not see: none."""
        return 0

    @property
    def horizon(self) -> int:
        """Tokens after which everything that generating allocates has been seen once; only after the first update."""
        return self.flush_length

    @property
    def seen_length(self) -> int:
        """Tokens that came, those that were evicted too: the position of the next one."""
        return self.get_seq_length() + self.evicted_length

    def get_max_length(self) -> int:
        """Return -1: the layer grows without a limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward of `query_length` tokens sees."""
        return self.get_seq_length() + query_length, 0

    def activate_past_recording(self) -> None:
        """Let `update` put off quantizing until `crop` says what stays: at least the newest `DEFERRED_LENGTH` tokens.

        After a crop the store is then the one that the remaining tokens make when they come one at a time.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens and quantize those that waited while the past was recorded, also for 0 tokens.

        Args:
            tokens_to_remove: zero or negative, as transformers counts since 5.18. Up to `residual_length` tokens come
                from the window, and while the past is recorded `DEFERRED_LENGTH` more; a deeper crop returns the
                tokens that are left of a cut group to it, dequantized.

        Raises:
            StatesError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise StatesError(f"crop({tokens_to_remove}) is not supported; pass a negative number of tokens to remove")
        if self.carried is not None:
            crop_carried(self.carried, tokens_to_remove)
        if not self.is_initialized:
            return
        self.check_whole()
        length = max(0, self.held_length + int(tokens_to_remove))  # a tensor where 5.17 decodes assisted
        flush_count = self._flush_count(length)
        if tokens_to_remove == 0 and not flush_count:
            return
        with self._undone_on_error():
            for side in self._sides.values():
                side.truncate(length)
                side.append(side.window.view()[:, :, :0], flush_count)
        self.kernel_cache.note_rearrangement()

    def evict(self, keep: torch.Tensor) -> None:
        """Forget all tokens but those named; see `KVQ.evict`.

        Raises:
            CacheStateError: the layer holds nothing.
            StatesError: `keep` does not fit; the layer is then as it was.
        """
        name = f"layer {self.layer_idx}"
        if not self.is_initialized:
            raise CacheStateError(f"{name} holds no tokens yet; run the model first")
        keys, values = self.materialize()
        kept = find_kept(keep, keys.shape, name)
        check_padding_stays(kept, self._seen_starts(), name)
        self.replace(gather_tokens(keys, kept), gather_tokens(values, kept))

    def replace(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Hold these states in the place of the present ones, and quantize them by the layer's rule.

        The stored blocks that begin both stay as they are, bit for bit; of all others the newest `residual_length`
        tokens are exact, and what was in the store is quantized once more. Fewer tokens than before count as evicted.

        Args:
            key_states: `[B, H, T, D_k]`, copied; batch, heads, head dim, dtype and device are those held.
            value_states: `[B, H, T, D_v]`, copied.

        Raises:
            CacheStateError: an indexer has a key for each token, by whose place it chooses; nothing is changed.
            StatesError: they do not fit, or would change the padding; the layer is then as it was.
        """
        self.check_states(key_states, value_states)
        if hasattr(self.carried, "indexer_keys") and key_states.shape[2] != self.held_length:
            raise CacheStateError(
                f"layer {self.layer_idx}: its indexer has a key for each token and chooses tokens by their place, so "
                "none can be evicted"
            )
        states: dict[Side, torch.Tensor] = {"key": key_states, "value": value_states}
        hidden, length, stored = self.hidden_length, key_states.shape[2], self._sides["key"].store.length
        before, newest = self.held_length - hidden, self.get_seq_length() - self.firm_length
        equal = [count_equal_ends(held, states[name]) for name, held in self._materialize_sides()]
        common, common_end = (min(counts) for counts in zip(*equal, strict=True))
        padding = max(self._seen_starts())
        if common < padding:
            raise StatesError(f"layer {self.layer_idx}: {padding} tokens of left padding cannot be replaced")
        start = 0 if hidden else min(common // self.flush_length * self.flush_length, stored)
        with self._undone_on_error():
            for side in self._sides.values():
                if hidden:
                    side.leap(hidden)
                else:
                    side.truncate(start)
            flush_count = self._flush_count(length - (DEFERRED_LENGTH if self.record_past else 0))
            for name, side in self._sides.items():
                side.append(states[name][:, :, start:], flush_count)
        self._note_rewriting(start < stored)
        if length < before:
            self.firm_length = self.get_seq_length() - min(common_end, newest)
        self.evicted_length = max(0, self.evicted_length + before - length)
        self.kernel_cache.note_rearrangement()

    def reset(self) -> None:
        """Forget everything, the padding too; the next update may bring states of another shape."""
        self._sides, self._assigned, self._rewritten = {}, {}, 0
        self.evicted_length = self.firm_length = 0
        self.padding = None
        self.is_initialized = False
        if self.carried is not None:
            reset_layer(self.carried)
        self.kernel_cache.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows: row `i` becomes the former row `beam_idx[i]`."""
        if self.is_initialized:
            # Indexing copies and checks the caller's tensor before anything is changed.
            self._select_rows(self._row_numbers()[beam_idx.cpu()])

    def count_rows(self) -> int | None:
        """Return the rows of the batch, or None before the first update."""
        return self._sides["key"].store.batch_size if self.is_initialized else None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._select_rows(self._row_numbers().repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch, integers or a mask."""
        if self.is_initialized:
            self._select_rows(self._row_numbers()[indices.cpu()])

    @property
    def is_offloaded(self) -> bool:
        """Whether the store lives on another device than the states."""
        return self.is_initialized and self._sides["key"].store.device != self.device

    def offload(self) -> None:
        """Keep the store on the CPU from now on; sinks and window stay with the states."""
        self.kernel_cache.forget_kernel_data()
        for side in self._sides.values():
            side.offload()

    def prefetch(self) -> None:
        """Copy an offloaded store to where the states are, for reads until the next `offload`."""
        for side in self._sides.values():
            side.prefetch()

    def release_prefetched(self) -> None:
        """Forget the copies of `prefetch`; views that read them keep them."""
        for side in self._sides.values():
            side.release_prefetched()

    def moved_to(self, device: torch.device) -> KVQLayer:
        """Return an independent layer with its states on another device."""
        other = self.fork()
        if other.carried is not None:
            other.carried = moved_layer(other.carried, device)
        if self.is_initialized:
            other.device, store_device = device, choose_store_device(self.settings.device, device)
            for name, side in self._sides.items():
                like = side.window.view()[:, :, :0].to(device)
                codec = build_codec(self.settings, name, self.layer_idx, like)
                other._sides[name] = side.moved_to(device, codec, store_device)
        return other

    def emptied(self, settings: ResolvedLayer | None = None, carried: Any = None) -> KVQLayer:
        """Return a layer of this kind that holds nothing.

        Args:
            settings: its configuration; default: this layer's.
            carried: an empty layer for what it has beside keys and values, or None.
        """
        return KVQLayer(self.layer_idx, settings or self.settings, self.padding, carried)

    def fork(self) -> KVQLayer:
        """Return an independent layer that shares the present chunks."""
        carried = None if self.carried is None else fork_layer(self.carried)
        other = self.emptied(carried=carried)
        other.is_initialized, other.record_past = self.is_initialized, self.record_past
        other.evicted_length, other._assigned = self.evicted_length, dict(self._assigned)
        other.firm_length, other._rewritten = self.firm_length, self._rewritten
        other.flush_delay = self.flush_delay
        if self.is_initialized:
            other.dtype, other.device = self.dtype, self.device
            other._sides = {name: side.fork() for name, side in self._sides.items()}
        return other

    def _seen_starts(self) -> tuple[int, ...]:
        """Return how many of the tokens that the next query sees are left padding, for each row."""
        hidden, seen = self.hidden_length, self.held_length - self.hidden_length
        return tuple(min(seen, max(0, start - hidden)) for start in self._sides["key"].sinks.starts)

    def _materialize_sides(self) -> Iterator[tuple[Side, torch.Tensor]]:
        yield from ((name, self._materialize(name)) for name in self._sides)

    def _materialize(self, name: Side) -> torch.Tensor:
        """Return the tokens of a side that the next query sees."""
        states, hidden = self._sides[name].view().materialize(), self.hidden_length
        return states[:, :, hidden:] if hidden else states

    def _assign(self, name: Side, states: torch.Tensor) -> None:
        """Take states for one side; they replace the present ones once the other side has as many tokens."""
        if not self.is_initialized:
            raise CacheStateError(f"{self._name(name)} cannot be assigned before the model has run; update the cache")
        check_states(f"layer {self.layer_idx}", states, states)
        check_continuity(f"layer {self.layer_idx}: {name} states", states, self._sides[name].window.view())
        self._assigned[name] = states.detach()
        given = {side: self._assigned.get(side) for side in self._sides}
        held = {side: self._materialize(side) if one is None else one for side, one in given.items()}
        if held["key"].shape[2] == held["value"].shape[2]:
            self._assigned = {}
            self.replace(held["key"], held["value"])

    def _note_rewriting(self, has_rewritten: bool) -> None:
        """Count how often stored tokens were quantized once more, and warn where that adds error each time."""
        self._rewritten += has_rewritten
        if self._rewritten > 1 and any(gets_other_numbers(side.codec) for side in self._sides.values()):
            warn_user_once(REWRITTEN_OFTEN)

    def check_whole(self) -> None:
        """Check that keys and values are of the same tokens.

        Raises:
            CacheStateError: one of them was assigned, and the other is still to come.
        """
        if not self._assigned:
            return
        (name, states), *_ = self._assigned.items()
        raise CacheStateError(
            f"{self._name(name)} were assigned with {states.shape[2]} tokens, and the other side still has "
            f"{self.held_length}; assign both sides, with as many tokens"
        )

    # Traced by torch.compile, decoding would become a part of the graph, and older releases know no subclass there.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def _show(self, name: Side) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        assigned = self._assigned.get(name)
        states = self._materialize(name) if assigned is None else assigned.clone()
        shown: ReadStates = ReadStates.of(states, self._name(name))
        return shown

    def _name(self, side: Side) -> str:
        return f"the {side}s of layer {self.layer_idx}"

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Undo every change since now if the block fails."""
        before = [(side, side.contents) for side in self._sides.values()]
        try:
            yield
        except BaseException:
            for side, contents in before:
                side.contents = contents
            raise

    def _select_rows(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self.check_whole()
        for side in self._sides.values():
            side.select_rows(rows)
        if self.carried is not None:
            select_rows(self.carried, rows)
        self.kernel_cache.note_rearrangement()

    def _row_numbers(self) -> torch.Tensor:
        return torch.arange(self._sides["key"].store.batch_size if self.is_initialized else 0)

    def will_flush(self, count: int) -> bool:
        """Return whether `count` more tokens let some leave the window."""
        return self._flush_count(self.held_length + count) > 0

    def _flush_count(self, total: int) -> int:
        """Return how many tokens leave the window when the layer holds `total` tokens that will stay."""
        keys = self._sides["key"]
        target = (total - self.settings.residual_length - self.flush_delay) // keys.flush_length * keys.flush_length
        return max(0, target - keys.store.length)

    def check_states(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check that states can be added.

        Raises:
            StatesError: rank, dtype or shape do not fit.
        """
        if self.is_initialized and self._go_on(key_states, value_states):
            return  # as at nearly every step: what follows says at length why not
        check_states(f"layer {self.layer_idx}", key_states, value_states)
        for states, (name, side) in zip((key_states, value_states), self.sides(), strict=False):
            check_continuity(f"layer {self.layer_idx}: {name} states", states, side.window.view())
        check_pair(f"layer {self.layer_idx}", key_states, value_states)  # last: the others know what to do

    def _go_on(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        keys, values = self._sides["key"].contents.window, self._sides["value"].contents.window
        is_fit = goes_on(key_states, keys.buffer) and goes_on(value_states, values.buffer)
        return is_fit and key_states.shape[2] == value_states.shape[2]
