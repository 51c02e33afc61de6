"""Steps of decoding that a CUDA graph can hold: one layer, from flush to flush, at addresses that stay.

`run` does work on the device alone: it reads lengths there, adds the token there, and asks the host nothing. What the
host has to know, `note_run` tells it. The step that flushes is the layer's own `update`; `refresh` follows it, and what
was captured before still holds, until the store has outgrown its room.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.handle import PackedPair
from kvq.attention.kernels.triton.fixed_launch import FixedLaunch, FixedPlan
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.errors import CacheStateError
from kvq.layers.quantized_layer import KVQLayer
from kvq.store.side import LayerSide, SideView
from kvq.store.window import TokenBuffer


class FixedStep:
    """The steps of one layer with one token a row, without padding.

    Args:
        layer: holds quantized tokens already, and all sinks that it is going to hold.
        query: a query like those to come, `[B, Hq, 1, D]`.
        scaling: factor of the dot products.
        room: tokens that the store may have; a store that outgrows them needs another object, and another capture.
        softcap: as for attention, or None.
        sink_logits: one more logit for each head, `[Hq]`, or None.

    Attributes:
        layer: the layer.
        plan: tables and sizes; another one after `refresh` would be a capture that no longer holds.

    Raises:
        CacheStateError: the kernel cannot serve such steps, or the room is too small.
    """

    def __init__(
        self,
        layer: KVQLayer,
        query: torch.Tensor,
        scaling: float,
        room: int,
        *,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        self.layer, self._scaling, self._softcap, self._sink_logits = layer, scaling, softcap, sink_logits
        self._capacity = layer.settings.residual_length + layer.flush_delay + layer.flush_length
        sides = [side for _, side in layer.sides()]
        self._buffers = [_allocate(side, self._capacity) for side in sides]
        new = [side.window.buffer.new_empty((*side.window.buffer.shape[:2], 1, side.window.buffer.shape[3]))
               for side in sides]  # fmt: skip
        request = self._request(query, new[0], new[1])
        reason = TRITON.why_unsupported(request) or self._why_too_early(room)
        if reason is not None:
            raise CacheStateError(f"layer {layer.layer_idx}: a step at fixed addresses is not possible: {reason}")
        self.plan = FixedPlan.of(request, room, self._capacity)
        self._sinks = [side.sinks.states for side in sides]
        self._length = torch.zeros(1, dtype=torch.int32, device=query.device)
        self.refresh()

    def may_run(self) -> bool:
        """Return whether the next token flushes nothing, and nobody else has changed the layer since."""
        layer = self.layer
        if not layer.is_initialized:
            return False
        stays = layer.kernel_cache.version == self._version
        return stays and not layer.will_flush(1) and layer.side("key").window.length < self._capacity

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to the layer with a new token, and add it; work on the device alone.

        Args:
            query: `[B, Hq, 1, D_k]`.
            key: `[B, H, 1, D_k]`.
            value: `[B, H, 1, D_v]`.

        Returns:
            The output `[B, 1, Hq, D_v]`.
        """
        output = FixedLaunch(self._request(query, key, value), self.plan, self._length).run()
        place = self._length.long()
        for buffer, states in zip(self._buffers, (key, value), strict=True):
            buffer.index_copy_(2, place, states)
        self._length.add_(1)
        return output

    def note_run(self) -> None:
        """Note on the host that `run`, or the replay of its capture, has added a token; nothing on the device."""
        for side, buffer in zip((side for _, side in self.layer.sides()), self._buffers, strict=True):
            window = side.window
            longer = TokenBuffer(window.step, buffer, window.length + 1, is_refilled=True)
            side.contents = replace(side.contents, window=longer)
        self.layer.kernel_cache.note_growth()
        self._version = self.layer.kernel_cache.version

    def refresh(self) -> None:
        """Take over what the layer holds now, after a step of its own: window and tables, in place.

        Raises:
            CacheStateError: the store has outgrown the room, or other tensors are in the place of those of then.
        """
        layer = self.layer
        reason = self._why_outdated()
        if reason is not None:
            raise CacheStateError(f"layer {layer.layer_idx}: {reason}; make another FixedStep, and capture it")
        for side, buffer in zip((side for _, side in layer.sides()), self._buffers, strict=True):
            held = side.window.view()
            if side.window.buffer is not buffer:
                buffer[:, :, : held.shape[2]].copy_(held)
                window = TokenBuffer(side.window.step, buffer, held.shape[2], is_refilled=True)
                side.contents = replace(side.contents, window=window)
        self._version = layer.kernel_cache.version
        self._length.fill_(layer.side("key").window.length)
        self.plan.fill(self._pair(None, None))

    def _why_too_early(self, room: int) -> str | None:
        """Return why addresses could not stay, or None."""
        keys = self.layer.side("key")
        if self.layer.is_sliding:
            return "the layer slides, and a step sees no mask"
        if keys.store.length > room:
            return f"the store has {keys.store.length} tokens, more than the room of {room}"
        return "not all sinks are stored yet" if keys.store.length < max(keys.sinks.ends) else None

    def _why_outdated(self) -> str | None:
        """Return why a capture does not hold any more, or None."""
        sides = [side for _, side in self.layer.sides()]
        if not sides or sides[0].store.length > self.plan.room:
            return f"the store has outgrown {self.plan.room} tokens, or was emptied"
        if sides[0].window.length > self._capacity:
            return f"the window has {sides[0].window.length} tokens, more than its room of {self._capacity}"
        is_same = all(side.sinks.states is kept for side, kept in zip(sides, self._sinks, strict=True))
        fits = sides[0].window.buffer.shape[0] == self._buffers[0].shape[0]
        return None if is_same and fits else "its rows or sinks are others now"

    def _request(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionRequest:
        return AttentionRequest(
            query,
            self._pair(key, value),
            None,
            self._scaling,
            softcap=self._softcap,
            sink_logits=self._sink_logits,
        )

    def _pair(self, key: torch.Tensor | None, value: torch.Tensor | None) -> PackedPair:
        keys, values = self.layer.side("key").contents, self.layer.side("value").contents
        return PackedPair(SideView(keys, key), SideView(values, value), self.layer.kernel_cache)


def _allocate(side: LayerSide, capacity: int) -> torch.Tensor:
    """Return room for a window of `capacity` tokens."""
    batch, heads, _, head_dim = side.window.buffer.shape
    with torch.inference_mode(False):
        return side.window.buffer.new_empty((batch, heads, capacity, head_dim))
