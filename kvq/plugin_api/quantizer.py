"""What a quantizer is: the two protocols, and the facts that one is built from.

Owns the contract between the core and a backend. It must not know how the core stores what a quantizer returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.statistics import LayerStatistics

Side = Literal["key", "value"]


@dataclass(frozen=True)
class QuantSpec:
    """One side of one layer, known at the first update.

    Attributes:
        side: keys or values.
        layer_idx: index of the layer in the model.
        nbits: bits per code, as configured; may be fractional.
        granularity: direction of the groups.
        group_length: elements that share a scale (G); for per-token groups already balanced over `head_dim`.
        num_heads: key-value heads (H).
        head_dim: elements of one head (D).
        states_dtype: dtype of the states that the cache receives and returns.
        metadata_dtype: dtype in which the core stores the metadata of affine quantizers.
        device: where the states live.
        seed: differs per layer and side, equal from run to run.
        statistics: what the states of this side of this layer were like on a text; None where the backend asks for no
            statistics, or the user has given none.
    """

    side: Side
    layer_idx: int
    nbits: float
    granularity: Granularity
    group_length: int
    num_heads: int
    head_dim: int
    states_dtype: torch.dtype
    metadata_dtype: torch.dtype
    device: torch.device
    seed: int
    statistics: LayerStatistics | None = field(default=None, compare=False, repr=False)


@runtime_checkable
class AffineQuantizer(Protocol):
    """Turns groups into codes on a line; the core owns packing, storage and the way back.

    Attributes:
        group_local: whether the result for a group depends on that group alone. Where False, the core always calls
            with exactly one block of one batch row, so the stored bytes never depend on how updates were split.

    A quantizer may have an attribute `rounds_to_nearest`. True says that its results are, bit for bit, those of kvq's
    own backend "native" without clipping: codes spread evenly from the least to the largest element. The core may then
    do it without calling `encode`, in C. Where the bytes of the first block differ, it calls `encode` all the same. And
    where `rounding_k` asks for it, the core takes the scales and offsets alone, and chooses other codes.
    """

    group_local: bool

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize groups such that `x ~ scale * code + offset`.

        Args:
            groups: fp32 `[..., G]`, on the device of the spec; not to be written to.

        Returns:
            codes: uint8 `[..., G]`, each below `2 ** ceil(nbits)`.
            scale: fp32 `[...]`, finite; 0 is legal and means a constant group.
            offset: fp32 `[...]`, finite; the value of code 0.
        """
        ...


@dataclass(frozen=True)
class Part:
    """One tensor of a representation.

    Attributes:
        shape: its shape for one block of one head; the core stores `[B, H, blocks, *shape]`.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one head."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@runtime_checkable
class Quantizer(Protocol):
    """Any representation made of tensors: codebooks, fp8, vector quantization.

    Attributes:
        block_length: the fewest tokens that are quantized together.
        group_local: as for `AffineQuantizer`, read "block" for "group".
    """

    block_length: int
    group_local: bool

    def layout(self) -> Mapping[str, Part]:
        """Return the parts of one block of one head; constant for the life of the quantizer."""
        ...

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize whole blocks.

        Args:
            states: `[B, H, T, D]` in the dtype of the states, T a multiple of `block_length`; not to be written to.

        Returns:
            A tensor `[B, H, T // block_length, *part.shape]` for each part of the layout.
        """
        ...

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the states that `parts` stand for into `out`; the only way back, from `parts` and constants alone.

        Args:
            parts: what `encode` returned, or any run of its blocks.
            out: `[B, H, T, D]`, every element to be overwritten.
        """
        ...

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return what `decode_into` needs beyond the parts: codebooks, rotations, static scales.

        They are counted, saved and moved once for the layer. Once the first block is encoded they must not change, and
        all that `encode` learned from it is in them: a loaded or moved cache builds a new quantizer, writes into the
        tensors that this returns, and goes on.
        """
        ...


class FusedScores(Protocol):
    """Optional: attention on the packed form. Absent, the core decodes chunk by chunk."""

    def prepare_query(self, query: torch.Tensor) -> Any:
        """Transform `query` `[B, Hq, Tq, D]` once for all chunks of a layer (rotate, fold constants)."""
        ...

    def scores(self, query: Any, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the dot products with the keys in `parts`, fp32 `[B, Hq, Tq, T]`, not scaled, not masked."""
        ...

    def mix(self, probabilities: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the sum of the values in `parts` weighted by `probabilities` `[B, Hq, Tq, T]`, fp32."""
        ...

    def finish_output(self, mixed: torch.Tensor) -> torch.Tensor:
        """Undo on the summed output what the values carry (a rotation); called once per layer."""
        ...
