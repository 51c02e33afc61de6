"""What one call adds to the addresses of a store: query, states in full precision, and how they are weighed.

From one step of decoding to the next only pointers and the length of the window change. So all of it is written once,
and afterwards those alone, for as long as nothing else differs.
"""

from __future__ import annotations

from typing import Any

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.compiled.structures import TYPE_NUMBERS, PackedRequest, States
from kvq.store.side import SideView

WINDOW, NEW = 1, 2
"""Places among the states of a side; sinks are at 0."""


class CallFields:
    """The fields of a `PackedRequest` that a call decides, but for output, mask and division of the work.

    Args:
        packed: the structure to write to.
    """

    def __init__(self, packed: PackedRequest) -> None:
        self._packed = packed
        self._facts: tuple[Any, ...] | None = None
        # Made once: taking a structure out of an array of them makes a new object.
        self._keys, self._values = packed.keys[WINDOW], packed.values[WINDOW]
        self._new_keys, self._new_values = packed.keys[NEW], packed.values[NEW]

    def write(self, request: AttentionRequest) -> object:
        """Write the fields for a request.

        Returns:
            What must live until the call is over, beside the request.
        """
        query, key, value = request.query, request.pair.key, request.pair.value
        facts = _facts_of(request)
        if facts is None or facts != self._facts:
            self._facts = facts
            return _fill(self._packed, request)
        self._packed.query = query.data_ptr()
        self._keys.length, self._values.length = key.contents.window.length, value.contents.window.length
        self._new_keys.data, self._new_values.data = key.new.data_ptr(), value.new.data_ptr()  # type: ignore[union-attr]
        return None


def _facts_of(request: AttentionRequest) -> tuple[Any, ...] | None:
    """Return all that decides the fields but for what `write` writes at every step; None where that is more."""
    query, key, value = request.query, request.pair.key, request.pair.value
    if key.new is None or value.new is None or request.sink_logits is not None:
        return None
    strides = query.stride(), key.new.stride(), value.new.stride()
    if not strides[0][-1] == strides[1][-1] == strides[2][-1] == 1:
        return None  # copies are read
    held = _places(key), _places(value)
    # As numbers: a model may hand over tensors, and change them in place.
    numbers = float(request.scaling), float(request.softcap or 0.0), request.is_causal
    return strides, query.shape, key.new.shape[2], query.dtype, held, numbers


def _places(side: SideView) -> tuple[Any, ...]:
    """Return where the window of a side and its sinks lie."""
    buffer, sinks = side.contents.window.buffer, side.contents.sinks.states
    return buffer.data_ptr(), buffer.stride(), sinks is not None and (sinks.data_ptr(), sinks.stride(), sinks.shape)


def _fill(packed: PackedRequest, request: AttentionRequest) -> list[torch.Tensor]:
    """Write every field; return the tensors that must live until the call is over."""
    query, pair = _with_contiguous_head(request.query), request.pair
    kept = [query]
    packed.query, packed.query_type = query.data_ptr(), TYPE_NUMBERS[query.dtype]
    packed.key_type, packed.value_type = TYPE_NUMBERS[pair.key.like.dtype], TYPE_NUMBERS[pair.value.like.dtype]
    packed.query_strides[:] = query.stride()[:3]
    packed.queries_per_head, packed.queries = request.queries_per_head, query.shape[2]
    packed.scaling, packed.softcap = request.scaling, request.softcap or 0.0
    packed.is_causal = request.is_causal and query.shape[2] > 1
    for states, side in ((packed.keys, pair.key), (packed.values, pair.value)):
        for place, tensor in enumerate((side.sinks.states if side.store.segments else None, side.window, side.new)):
            if tensor is not None:
                kept.append(_fill_states(states[place], tensor))
            else:
                states[place].data, states[place].length = None, 0
    if request.sink_logits is None:
        packed.sink_logits = None
    else:
        kept.append(request.sink_logits.float().contiguous())
        packed.sink_logits = kept[-1].data_ptr()
    return kept


def _fill_states(states: States, tensor: torch.Tensor) -> torch.Tensor:
    tensor = _with_contiguous_head(tensor)
    states.data = tensor.data_ptr()
    states.batch_stride, states.head_stride, states.token_stride, _ = tensor.stride()
    states.length = tensor.shape[2]
    return tensor


def _with_contiguous_head(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
