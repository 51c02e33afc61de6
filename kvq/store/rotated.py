"""The core's rotation around a backend that stores a representation of its own.

The backend quantizes rotated states as if they were those of the model. Where it computes on its packed form, the query
is rotated as the keys are and the output of values back; where it does not, decoding turns the states back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.dtype_range import clamp_to_dtype
from kvq.plugin_api.packed_format import ROTATION_SIGNS
from kvq.plugin_api.quantizer import Quantizer, QuantSpec
from kvq.store.guard import GuardedQuantizer
from kvq.store.origin import Origin
from kvq.store.rotation import HadamardRotation

OUTER_ROTATION_SIGNS = "outer_rotation_signs"
"""Name of the constant with the signs, around a backend that has signs of its own."""
DECODE_ELEMENTS = 1 << 20
"""Elements that are decoded at a time: the rotation needs a float32 copy of them."""


class RotatedQuantizer(GuardedQuantizer):
    """Satisfies `Quantizer` with one that is given rotated states.

    Args:
        quantizer: the backend's.
        origin: what errors name.
        spec: what it was built from.
        rotation: the rotation.

    Raises:
        QuantizerContractError: its layout or its constants are not what the contract says, or a constant has the name
            of the rotation's own.
    """

    rotation_word = "hadamard"

    def __init__(self, quantizer: Quantizer, origin: Origin, spec: QuantSpec, rotation: HadamardRotation) -> None:
        self.rotation = rotation
        super().__init__(quantizer, origin, spec)
        packed = self.packed_format
        is_rotated = packed is not None and packed.rotation_block > 0
        self._signs_name = OUTER_ROTATION_SIGNS if is_rotated else ROTATION_SIGNS
        if packed is not None and (packed.states_dim or is_rotated):
            self.packed_format = None  # no kernel rotates twice, or before it spreads the query over stored channels
        elif packed is not None:
            self.packed_format = replace(packed, rotation_block=rotation.block_size)
        self._first_block_kind = "rotated", self._first_block_kind
        if self._signs_name in super().constants():
            raise QuantizerContractError(
                f"{origin}: constants has {self._signs_name!r}, which is the rotation's; choose another name"
            )

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return those of the backend, and the signs of the rotation."""
        return {**super().constants(), self._signs_name: self.rotation.signs}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize whole blocks of `[B, H, T, D]`, rotated and rounded to the dtype of the states.

        A token with an element that is not finite is NaN in all that a transform spreads it over.
        """
        rotated = self.rotation.apply(states.float())
        lost = ~rotated.isfinite()
        return super().encode(clamp_to_dtype(rotated, states.dtype).masked_fill_(lost, math.nan).to(states.dtype))

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the states that `parts` stand for, turned back, into `out` `[B, H, T, D]`."""
        blocks = out.shape[2] // self.block_length
        count = max(1, DECODE_ELEMENTS // max(1, out[:, :, : self.block_length].numel()))
        for first in range(0, blocks, count):
            last = min(first + count, blocks)
            piece = {name: part[:, :, first:last] for name, part in parts.items()}
            own = out[:, :, first * self.block_length : last * self.block_length]
            rotated = torch.empty(own.shape, dtype=torch.float32, device=own.device)
            super().decode_into(piece, rotated)
            own.copy_(clamp_to_dtype(self.rotation.undo(rotated), own.dtype))

    def _named(self, operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        call = super()._named(operation, method)
        if operation == "prepare_query":
            return lambda query: call(self.rotation.apply(query.float()).to(query.dtype))
        if operation == "finish_output":
            return lambda mixed: self.rotation.undo(call(mixed).float())
        return call
