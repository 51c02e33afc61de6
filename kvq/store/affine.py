"""The storage of affine quantizers: grouping, packing and metadata around a backend that decides numbers.

`AffineCodec` gives any `AffineQuantizer` the shape of a `Quantizer`, so the rest of the store knows one kind only.
A stored group is `scale * (code - 2 ** (bits - 1)) + mid`: centred codes, with the value of the middle code instead of
the value of code 0, because scale and mid are what survives a narrow dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional

from kvq.errors import QuantizerContractError
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.packed_format import PER_TOKEN_BLOCK_LENGTH, ROTATION_SIGNS, PackedFormat
from kvq.plugin_api.packing import pack, plane_widths, split_planes
from kvq.plugin_api.quantizer import AffineQuantizer, Part, QuantSpec
from kvq.store.balance import even_out
from kvq.store.byte_metadata import write_bytes
from kvq.store.clipping import clip
from kvq.store.error_feedback import ErrorFeedback
from kvq.store.first_blocks import check_first_codes, kind_of
from kvq.store.origin import Origin, name_quantizer
from kvq.store.packed_decoding import decode_packed
from kvq.store.packed_parts import read_metadata
from kvq.store.rotation import HadamardRotation

EXPONENT_TARGET = 14
"""Metadata in float16 is scaled by a power of two per block, which brings its largest magnitude to about 2 ** 14."""
LOWEST_EXPONENT = -1000
"""Stands for the exponent of a number that has none: 0, or one that is not finite."""


def balanced_group_length(head_dim: int, group_size: int) -> int:
    """Return the length of per-token groups: `ceil(D / G)` groups of nearly equal length."""
    return math.ceil(head_dim / math.ceil(head_dim / group_size))


class BlockEncoder(Protocol):
    """Encodes and decodes whole blocks in torch's place: compiled code, which the store never names."""

    def encode(self, codec: AffineCodec, states: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
        """Return the very bytes of `AffineCodec.encode_by_torch`, in new tensors, or None where states are not served.

        Args:
            codec: what encodes them otherwise.
            states: whole blocks `[B, H, T, D]`; not written to.
        """
        ...

    def decode_into(self, codec: AffineCodec, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> bool:
        """Write the very states of `AffineCodec.decode_by_torch` into `out`; return whether these are served.

        Args:
            codec: what decodes them otherwise, over what may stand in `out` then.
            parts: any run of blocks, `[B, H, blocks, *part.shape]`.
            out: `[B, H, T, D]`.
        """
        ...


class AffineCodec:
    """Stores what an `AffineQuantizer` decides; satisfies `Quantizer`.

    Args:
        quantizer: the backend's quantizer.
        spec: the spec that it was built from.
        rotation: applied to the states before quantizing and undone after, or None.
        compute_dtype: dtype that decoding computes in.
        scale_dtype: dtype that scales are stored in, or None: that of the spec, which mid always has. Beside mids in
            int8 scales are bytes too.
        backend: name of what built the quantizer, for errors.
        balanced: whether each token is divided by a factor of its own after the rotation; per channel only.
        clip_share: the part of each group's range, around its middle, that codes are spread over.
        feedback: chooses the codes in the place of the backend, which decides the lines alone then; or None. For keys.
        encoder: may encode in the place of torch, or None.

    Attributes:
        packed_format: where codes, scales and mids lie, for kernels, which read them without this class.
    """

    def __init__(
        self,
        quantizer: AffineQuantizer,
        spec: QuantSpec,
        rotation: HadamardRotation | None = None,
        compute_dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype | None = None,
        backend: str = "",
        *,
        balanced: bool = False,
        clip_share: float = 1.0,
        feedback: ErrorFeedback | None = None,
        encoder: BlockEncoder | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.spec = spec
        self.rotation = rotation
        self.compute_dtype = compute_dtype
        self.clip_share = clip_share
        self.feedback = feedback
        self.encoder = encoder
        self.bits = math.ceil(spec.nbits)
        self.per_channel = spec.granularity is Granularity.PER_CHANNEL
        self.block_length = spec.group_length if self.per_channel else PER_TOKEN_BLOCK_LENGTH
        self.group_local = quantizer.group_local
        self.origin = Origin.of(backend or type(quantizer).__name__, spec)
        self._name = name_quantizer(self)
        self._kind = kind_of(backend, quantizer, spec)
        scale_dtype = torch.uint8 if spec.metadata_dtype is torch.int8 else scale_dtype or spec.metadata_dtype
        self.packed_format = PackedFormat(
            bits=self.bits,
            plane_widths=plane_widths(self.bits),
            # Keys lie channel-major, values token-major: along what their dot products with queries and weights run.
            packed_dim=-1 if spec.side == "key" else -2,
            head_dim=spec.head_dim,
            block_length=self.block_length,
            granularity=spec.granularity,
            group_length=spec.group_length,
            scale_dtype=scale_dtype,
            mid_dtype=spec.metadata_dtype,
            has_exponent=scale_dtype is torch.float16,
            has_factor=balanced,
            rotation_block=0 if rotation is None else rotation.block_size,
            compute_dtype=compute_dtype,
        )

    @property
    def kind(self) -> type:
        """The class of the backend's quantizer."""
        return type(self.quantizer)

    def layout(self) -> Mapping[str, Part]:
        """Return code planes, scale, mid and, as the format has them, exponent or units, and factors of tokens."""
        return self.packed_format.layout()

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return the signs of the rotation, if there is one."""
        return {} if self.rotation is None else {ROTATION_SIGNS: self.rotation.signs}

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize whole blocks of `[B, H, T, D]` in one call of the backend; the parts never alias the input.

        A group with an element that is not finite comes back as NaN, all of it: its states are lost, and no ordinary
        number may take their place. The backend sees zeros there.
        """
        parts = None if self.encoder is None else self.encoder.encode(self, states)
        return self.encode_by_torch(states) if parts is None else parts

    def encode_by_torch(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do as `encode`, without compiled code: what that is compared with."""
        rotated = states if self.rotation is None else self.rotation.apply(states.float())
        blocks: torch.Tensor = rotated.unflatten(2, (-1, self.block_length))
        parts: dict[str, torch.Tensor] = {}
        if self.packed_format.has_factor:
            blocks, parts["factor"] = even_out(blocks.float())
        groups = self._group(blocks).float()
        lost = groups.abs().amax(-1).isfinite().logical_not_()
        if lost.device.type != "cpu" or lost.any():  # elsewhere asking takes longer than filling
            groups = groups.masked_fill(lost[..., None], 0)
        codes, scale, offset = self._quantize(groups, lost)
        for width, plane in split_planes(self._ungroup(codes), self.bits).items():
            parts[f"codes_{width}"] = pack(plane, width, self.packed_format.packed_dim)
        return {**parts, **self._round_metadata(scale, offset, lost)}

    def encode_groups(
        self, groups: torch.Tensor, lost: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the backend makes of groups, checked.

        Args:
            groups: fp32, `[B, H, blocks, D, L]` per channel, `[B, H, blocks, L, groups, G]` per token.
            lost: bool `[...]`, the groups whose states are not finite, which hold zeros.

        Returns:
            Codes uint8 in the shape of `groups`, scale and offset fp32 in that of `lost`.
        """
        with self.origin.naming("encode"):
            encoded = self.quantizer.encode(groups)
        if not isinstance(encoded, (tuple, list)) or len(encoded) != 3:
            found = f"{len(encoded)} things" if isinstance(encoded, (tuple, list)) else f"a {type(encoded).__name__}"
            raise QuantizerContractError(
                f"{self.origin}: encode returned {found}; the contract is codes, scale, offset"
            )
        codes, scale, offset = encoded
        self._check_result(groups, codes, scale, offset)
        check_first_codes(self._kind, self._name, self.bits, (codes, scale, offset), lost)
        return codes, scale, offset

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the states that parts stand for into `out` `[B, H, T, D]`; see `decode_packed`."""
        if self.encoder is None or not self.encoder.decode_into(self, parts, out):
            self.decode_by_torch(parts, out)

    def decode_by_torch(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Do as `decode_into`, without compiled code."""
        decode_packed(self.packed_format, self.rotation, parts, out, {})

    def _quantize(self, groups: torch.Tensor, lost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clip groups, let the backend quantize them, and choose their codes for the queries if that is asked for.

        Arguments and results are those of `encode_groups`.
        """
        clipped = clip(groups, self.clip_share) if self.clip_share < 1 else groups
        codes, scale, offset = self.encode_groups(clipped, lost)
        if self.feedback is not None:
            # Against the lines that are stored, whose error is made up for too.
            stored = read_metadata(self.packed_format, self._round_metadata(scale, offset, lost))
            chosen = self.feedback.choose_codes(self.packed_format, self._by_channel(groups), *stored)
            codes = chosen.contiguous() if self.per_channel else self._fill_in(codes, chosen)
        return codes, scale, offset

    def _group(self, states: torch.Tensor) -> torch.Tensor:
        """Return `[B, H, blocks, D, L]` per channel, `[B, H, blocks, L, groups, G]` per token."""
        if self.per_channel:
            return states.transpose(-1, -2).contiguous()
        missing = self.packed_format.groups_per_token * self.spec.group_length - self.spec.head_dim
        if missing:
            # The last group is filled up with its own last element, which leaves its range as it is.
            states = functional.pad(states.flatten(0, 2), (0, missing), mode="replicate").unflatten(0, states.shape[:3])
        groups: torch.Tensor = states.unflatten(-1, (self.packed_format.groups_per_token, self.spec.group_length))
        return groups.contiguous()

    def _ungroup(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes with tokens along the dimension that is packed."""
        if self.per_channel:
            return codes if self.packed_format.packed_dim == -1 else codes.transpose(-1, -2)
        codes = codes.flatten(-2)[..., : self.spec.head_dim]
        return codes.transpose(-1, -2) if self.packed_format.packed_dim == -1 else codes

    def _by_channel(self, groups: torch.Tensor) -> torch.Tensor:
        """Return groups as `[B, H, blocks, D, L]`."""
        return groups if self.per_channel else groups.flatten(-2)[..., : self.spec.head_dim].mT

    def _fill_in(self, codes: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return codes `[B, H, blocks, L, groups, G]` with those of `[B, H, blocks, D, L]` in their places."""
        rows = codes.flatten(-2).clone()
        rows[..., : self.spec.head_dim] = chosen.mT
        filled: torch.Tensor = rows.unflatten(-1, codes.shape[-2:])
        return filled

    def _round_metadata(self, scale: torch.Tensor, offset: torch.Tensor, lost: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = self.packed_format
        # In two steps: the whole distance to the middle may be past the largest fp32 where both ends are not.
        half_way = scale * 2.0 ** (self.bits - 2)
        mid = (offset + half_way + half_way).masked_fill_(lost, math.nan)
        if packed.has_units:
            return write_bytes(scale, mid)
        if not packed.has_exponent:
            return {"scale": scale.to(packed.scale_dtype), "mid": mid.to(packed.mid_dtype)}
        # float16 spans 30 binary orders of magnitude, states of bfloat16 and float32 far more: one power of two per
        # block and head, decided by that block alone, moves them into range without losing a bit.
        reach = _exponent(scale) + self.bits
        largest = torch.maximum(_exponent(mid), reach) if packed.shifts_mid else reach
        exponent = largest.flatten(3).amax(-1).sub(EXPONENT_TARGET).clamp(-120, 120)
        shift = -exponent.reshape(*exponent.shape, *[1] * (scale.dim() - 3))
        return {
            "scale": torch.ldexp(scale, shift).to(packed.scale_dtype),
            "mid": (torch.ldexp(mid, shift) if packed.shifts_mid else mid).to(packed.mid_dtype),
            "exponent": exponent.to(torch.int8),
        }

    def _check_result(self, groups: torch.Tensor, codes: Any, scale: Any, offset: Any) -> None:
        expected = {"codes": (groups.shape, torch.uint8)}
        expected["scale"] = expected["offset"] = (groups.shape[:-1], torch.float32)
        for name, tensor in (("codes", codes), ("scale", scale), ("offset", offset)):
            shape, dtype = expected[name]
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.shape == shape and tensor.dtype == dtype:
                continue
            found = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else f"a {type(tensor).__name__}"
            raise QuantizerContractError(
                f"{self._name}.encode returned {name} as {found} for groups {list(groups.shape)}; "
                f"the contract is {dtype} {list(shape)}"
            )


def _exponent(numbers: torch.Tensor) -> torch.Tensor:
    """Return the binary exponent of each number, int32; where there is none, `LOWEST_EXPONENT`."""
    return torch.frexp(numbers)[1].masked_fill(~numbers.isfinite() | (numbers == 0), LOWEST_EXPONENT)
