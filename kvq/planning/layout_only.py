"""A quantizer for the meta device, where tensors have shapes and no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvq.plugin_api.quantizer import Part, Quantizer


class LayoutOnly:
    """Satisfies `Quantizer`: has the layout and the constants of another one, and encodes nothing.

    Args:
        quantizer: the other one.
    """

    group_local = True

    def __init__(self, quantizer: Quantizer) -> None:
        self.block_length = quantizer.block_length
        self._layout = quantizer.layout()
        self._constants = quantizer.constants()
        self._encoded: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

    def layout(self) -> Mapping[str, Part]:
        """Return the parts of one block of one head."""
        return self._layout

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return the constants of the other quantizer."""
        return self._constants

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return the parts of whole blocks of `[B, H, T, D]`, on the meta device."""
        outer = (*states.shape[:2], states.shape[2] // self.block_length)
        if outer not in self._encoded:  # a long prompt asks for the same some thousand times
            self._encoded[outer] = {
                name: torch.empty((*outer, *part.shape), dtype=part.dtype, device="meta")
                for name, part in self._layout.items()
            }
        return self._encoded[outer]

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write nothing: there are no numbers."""
