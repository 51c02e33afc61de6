"""How the sides of a layer lie, as far as it is compiled into a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvq.attention.kernels.triton.assembly import open_bytes, split, widen
from kvq.attention.kernels.triton.chunk_table import MAX_PLANES
from kvq.plugin_api.packed_format import PackedFormat, get_packed_format
from kvq.store.chunks import StoreView

SMALLEST_DOT = 16
"""Least inner dimension of a product."""
PER_CHANNEL, PER_TOKEN, GROUPED = range(3)
"""As in `programs.py`."""
SPLITS = (1, 2, 4)
"""Ranges of channels that a program can add up by themselves."""


@dataclass(frozen=True)
class SideLayout:
    """The facts of a side that are compiled into a program.

    Attributes:
        head_dim: D, of keys that are sums of channels the channels.
        packed: the side's format.
        split: ranges of channels of equal length that are added up by themselves, since each has scales of its own.
    """

    head_dim: int
    packed: PackedFormat
    split: int = 1

    @classmethod
    def of_keys(cls, view: StoreView) -> SideLayout:
        """Return the layout of keys whose quantizer has a packed format."""
        packed = get_packed_format(view.codec)
        return cls(packed.head_dim, packed)

    @classmethod
    def of_values(cls, view: StoreView, head_dim: int) -> SideLayout:
        """Return the layout of values whose quantizer has a packed format."""
        packed = get_packed_format(view.codec)
        groups = packed.groups_per_token if not packed.per_channel else 1
        is_even = groups in SPLITS and groups * packed.group_length == head_dim == padded(head_dim)
        return cls(head_dim, packed, groups if is_even else 1)

    @property
    def mode(self) -> int:
        """The way in which scales lie, by its number in `programs.py`."""
        if self.packed.per_channel:
            return PER_CHANNEL
        return PER_TOKEN if self.packed.groups_per_token == self.split else GROUPED

    def options(self, name: str, letter: str, dtype: torch.dtype) -> dict[str, Any]:
        """Return the compile-time arguments of a side called `name`, whose products are in `dtype`."""
        packed, widths = self.packed, self.packed.plane_widths
        planes = {f"{letter}{place}": widths[place] if place < len(widths) else 0 for place in range(MAX_PLANES)}
        return {
            f"{name}_DIM": self.head_dim,
            f"{name}_PADDED": padded(self.head_dim),
            f"{name}_LENGTH": packed.block_length,
            f"{name}_MODE": self.mode,
            f"{name}_GROUP": packed.group_length,
            f"{name}_SCALE": triton_dtype(packed.scale_dtype),
            f"{name}_MID": triton_dtype(packed.mid_dtype),
            f"{name}_SHIFTED": packed.has_exponent,
            f"{name}_MID_SHIFTED": packed.shifts_mid,
            f"{name}_FACTOR": packed.has_factor,
            f"{letter}L": packed.has_codebook,
            **planes,
            **self._assembly(name, letter, dtype),
        }

    def _assembly(self, name: str, letter: str, dtype: torch.dtype) -> dict[str, str]:
        """Return the lines of PTX that take the codes apart."""
        widths = self.packed.plane_widths
        splits = [split(width) if width in (2, 4) else "" for width in widths]
        found = {f"{letter}S{place}": splits[place] if place < len(widths) else "" for place in range(MAX_PLANES)}
        is_half = dtype != torch.float32 and self.mode != GROUPED and not self.packed.has_codebook
        found[f"{name}_OPEN"] = open_bytes(widths[0], dtype) if is_half and widths in ((2,), (4,)) else ""
        found[f"{name}_WIDEN"] = widen(self.packed.bits, dtype) if is_half else ""
        return dict.fromkeys(found, "") if is_interpreted() else found


def power_of_two(count: int) -> int:
    """Return the least power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


def padded(head_dim: int) -> int:
    """Return the channels of a tile in registers."""
    return max(SMALLEST_DOT, power_of_two(head_dim))


def triton_dtype(dtype: torch.dtype | None) -> Any:
    """Return a dtype of torch as Triton names it; for None `int1`, which stands for no part at all."""
    import triton.language as tl

    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", None: "int1"}
    return getattr(tl, {**names, torch.uint8: "uint8", torch.int8: "int8"}[dtype])


def is_interpreted() -> bool:
    """Return whether Triton interprets the programs, on the CPU; it runs no PTX then."""
    import triton

    return bool(triton.knobs.runtime.interpret)
