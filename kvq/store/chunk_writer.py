"""Making chunks and writing encoded blocks into them, for one store.

It asks the quantizer for the layout of its parts and hands them back to it, and must not know what the parts mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.guard import GuardedQuantizer
from kvq.store.origin import name_quantizer
from kvq.store.segments import Segment

ENCODE_ELEMENTS = 1 << 19
"""Elements quantized in one call, which bounds the temporaries to some MiB however much is flushed."""


class ChunkWriter:
    """Allocates the chunks of one side of one layer and fills them.

    Args:
        codec: the quantizer that encodes and decodes; its layout decides the allocation.
        num_heads: key-value heads (H).
        device: where the chunks live.
        pinned: whether they are in memory that a GPU copies from on its own.
        chunk_lengths: tokens of the smallest and of the largest chunk; None: as `chunk_capacity` has it.
    """

    def __init__(
        self,
        codec: Quantizer,
        num_heads: int,
        device: torch.device,
        *,
        pinned: bool = False,
        chunk_lengths: tuple[int, int] | None = None,
    ) -> None:
        self.codec = codec
        self.num_heads = num_heads
        self.device = device
        self.pinned = pinned
        self.chunk_lengths = chunk_lengths
        self.block_length = codec.block_length
        self.layout = dict(codec.layout())

    def allocate(self, capacity: int, rows: int) -> Segment:
        """Return an empty chunk with room for `capacity` blocks of `rows` rows."""
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            parts = {
                name: torch.empty(
                    (rows, self.num_heads, capacity, *part.shape),
                    dtype=part.dtype,
                    device=self.device,
                    pin_memory=self.pinned,
                )
                for name, part in self.layout.items()
            }
        return Segment(parts, used=0, capacity=capacity)

    def copy(self, segment: Segment, rows: int) -> Segment:
        """Return a chunk of as many blocks, in the order of a batch of `rows` rows, that nobody else reads."""
        copy = self.allocate(segment.capacity, rows)
        for name, part in segment.read(0, segment.used).items():
            copy.parts[name][:, :, : segment.used].copy_(part)
        return replace(copy, used=segment.used)

    def write(self, segment: Segment, states: torch.Tensor) -> Segment:
        """Encode whole blocks of `[B, H, T, D]` behind the used blocks of a chunk and return it with them."""
        for rows, first, block_states in self._calls(states):
            self._write(segment, rows, segment.used + first, block_states)
        return replace(segment, used=segment.used + states.shape[2] // self.block_length)

    def _calls(self, states: torch.Tensor) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Yield the tokens quantized together: rows of the batch, index of the first block, and their states."""
        per_block = states[:, :, : self.block_length].numel()
        blocks = max(1, ENCODE_ELEMENTS // per_block) if self.codec.group_local else 1
        rows = states.shape[0] if self.codec.group_local else 1
        for row in range(0, states.shape[0], rows):
            chosen = slice(row, row + rows)
            for index, piece in enumerate(states[chosen].split(blocks * self.block_length, dim=2)):
                yield chosen, index * blocks, piece

    def _write(self, segment: Segment, rows: slice, first: int, states: torch.Tensor) -> None:
        encoded = self.codec.encode(states)
        count = states.shape[2] // self.block_length
        self._check_encoded(encoded, states.shape[0], count)
        if isinstance(self.codec, GuardedQuantizer):
            self.codec.look_at_first(states, encoded)
        for name, part in segment.parts.items():
            part[rows].narrow(2, first, count).copy_(encoded[name])

    def _check_encoded(self, encoded: object, rows: int, blocks: int) -> None:
        name = name_quantizer(self.codec)
        if not isinstance(encoded, Mapping) or encoded.keys() != self.layout.keys():
            found = sorted(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
            raise QuantizerContractError(f"{name}.encode returned {found}; its layout has {sorted(self.layout)}")
        for part_name, part in self.layout.items():
            shape = (rows, self.num_heads, blocks, *part.shape)
            tensor = encoded[part_name]
            if tuple(tensor.shape) != shape or tensor.dtype != part.dtype:
                raise QuantizerContractError(
                    f"{name}.encode returned {part_name!r} as {tensor.dtype} {list(tensor.shape)}; "
                    f"its layout says {part.dtype} {list(shape)}"
                )
