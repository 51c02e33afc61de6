"""The compiled encoder of one codec, and when it is trusted.

The bytes are those of `AffineCodec.encode_by_torch`, but for which NaN of several it is: torch 2.6 writes more than
one. Every process makes sure of it: the first block of each kind is encoded by torch too, and code that differs
otherwise is not called again in the process.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import torch

from kvq.attention.machine.variables import KERNEL_VARIABLE, read_variable
from kvq.encoding.library import EncodeLibrary, find_encode_library
from kvq.encoding.request import (
    STATES_DTYPES,
    address_of,
    describe_codec,
    find_block_strides,
    is_served,
    make_request,
)
from kvq.encoding.structure import DECODE, PREPARE, STORE, WHOLE
from kvq.store.affine import AffineCodec

_LOG = logging.getLogger("kvq")
REFERENCE_NAME = "eager"
"""Value of `KVQ_ATTENTION_KERNEL` that leaves everything to torch, quantizing too."""


class Trust:
    """What this process has found of the compiled code.

    Attributes:
        agreed: kinds of calls that have given the bytes of torch.
        fault: why the code is not called any more, or None.
    """

    def __init__(self) -> None:
        self.agreed: set[Hashable] = set()
        self.fault: str | None = None

    def lose(self, fault: str) -> None:
        """Call the code no more."""
        self.fault = fault
        _LOG.warning(
            "quantizing in C is switched off in this process, and torch does it: %s; please report this with the "
            "output of `kvq doctor --json`",
            fault,
        )


TRUST = Trust()


class CompiledEncoder:
    """Satisfies `BlockEncoder`; belongs to one codec."""

    def __init__(self) -> None:
        self._described: bytes | None = None

    def __reduce__(self) -> tuple[type[CompiledEncoder], tuple[()]]:
        """Copy as a new one: a description holds addresses of this process."""
        return CompiledEncoder, ()

    def encode(self, codec: AffineCodec, states: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
        """Return the parts of states, or None."""
        library = _find_library(codec, states)
        if library is None:
            return None
        parts = _call(library, self._describe(codec), codec, states if states.stride(-1) == 1 else states.contiguous())
        return parts if parts is not None and _is_trusted(codec, states, parts) else None

    def decode_into(self, codec: AffineCodec, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> bool:
        """Write the states that parts stand for into `out`; return whether it did."""
        library = _find_library(codec, out)
        if library is None or out.stride(-1) != 1 or codec.compute_dtype is not torch.float32 or not out.numel():
            return False
        strides = find_block_strides(parts) if _are_here(parts) else None
        if strides is None:
            return False
        request = make_request(self._describe(codec), codec, out, parts, library)
        request.stage, (request.row_blocks, request.head_blocks) = DECODE, strides
        return not library.encode(address_of(request)) and _is_decoding_trusted(codec, parts, out)

    def _describe(self, codec: AffineCodec) -> bytes:
        if self._described is None:
            self._described = describe_codec(codec)
        return self._described


def _find_library(codec: AffineCodec, states: torch.Tensor) -> EncodeLibrary | None:
    """Return the compiled code if it may encode or decode such states."""
    return find_encode_library() if TRUST.fault is None and _fits(codec, states) else None


def _are_here(parts: Mapping[str, torch.Tensor]) -> bool:
    return all(type(part) is torch.Tensor and part.device.type == "cpu" for part in parts.values())


def _fits(codec: AffineCodec, states: torch.Tensor) -> bool:
    """Return whether the compiled code may encode these."""
    if type(states) is not torch.Tensor or states.device.type != "cpu" or states.dtype not in STATES_DTYPES:
        return False
    return read_variable(KERNEL_VARIABLE) != REFERENCE_NAME and is_served(codec.packed_format)


def _call(
    library: EncodeLibrary, described: bytes, codec: AffineCodec, states: torch.Tensor
) -> dict[str, torch.Tensor] | None:
    """Return the parts of states, or None where there was no memory for a block."""
    leading = (*states.shape[:2], states.shape[2] // codec.block_length)
    parts = {
        name: torch.empty((*leading, *part.shape), dtype=part.dtype, device=states.device)
        for name, part in codec.layout().items()
    }
    request = make_request(described, codec, states, parts, library)
    if getattr(codec.quantizer, "rounds_to_nearest", False):
        request.stage = WHOLE
        if codec.feedback is not None:
            order, weights = codec.feedback.on(states.device)
            request.order, request.weights = order.data_ptr(), weights.data_ptr()
        return None if library.encode(address_of(request)) else parts
    if codec.feedback is not None:
        return None
    groups, lost = _make_groups(codec, leading, states.device)
    request.stage, request.group_values, request.lost = PREPARE, groups.data_ptr(), lost.data_ptr()
    if library.encode(address_of(request)):
        return None
    codes, scale, offset = (said.contiguous() for said in codec.encode_groups(groups, lost))
    request.stage, request.codes = STORE, codes.data_ptr()
    request.said_scale, request.said_offset = scale.data_ptr(), offset.data_ptr()
    return None if library.encode(address_of(request)) else parts


def _make_groups(
    codec: AffineCodec, leading: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for groups fp32 `[B, H, blocks, ..., G]`, and for which of them are lost, bool."""
    packed = codec.packed_format
    shape = (packed.head_dim,) if packed.per_channel else (packed.block_length, packed.groups_per_token)
    groups = torch.empty((*leading, *shape, packed.group_length), dtype=torch.float32, device=device)
    return groups, torch.empty((*leading, *shape), dtype=torch.bool, device=device)


def _is_trusted(codec: AffineCodec, states: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> bool:
    """Return whether blocks of this kind are as torch makes them; compares the first one."""
    kind = codec.packed_format, codec.clip_share, states.dtype, codec.kind, codec.feedback is not None
    if kind in TRUST.agreed or not states.numel():
        return True
    expected = codec.encode_by_torch(states[:1, :, : codec.block_length])
    for name, part in expected.items():
        if not _are_same(parts[name][:1, :, :1], part):
            TRUST.lose(f"{name} differs from what torch makes of the same {str(states.dtype)[6:]} states")
            return False
    if expected["units" if "units" in expected else "scale"].any():
        TRUST.agreed.add(kind)  # equal numbers alone would prove little
    return True


def _are_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two parts have the same bytes, whichever NaN of several stands for no number."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    lost = expected.isnan()
    found_bytes, expected_bytes = (part.masked_fill(lost, 0).view(torch.uint8) for part in (found, expected))
    return torch.equal(found.isnan(), lost) and torch.equal(found_bytes, expected_bytes)


def _is_decoding_trusted(codec: AffineCodec, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> bool:
    """Return whether states of this kind are as torch makes them; compares the first block."""
    kind = "decoding", codec.packed_format, out.dtype
    if kind in TRUST.agreed:
        return True
    found = out[:1, :, : codec.block_length]
    expected = torch.empty_like(found)
    codec.decode_by_torch({name: part[:1, :, :1] for name, part in parts.items()}, expected)
    if not torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
        TRUST.lose(f"decoded {str(out.dtype)[6:]} states differ from what torch makes of the same block")
        return False
    if expected.nan_to_num().any():
        TRUST.agreed.add(kind)
    return True
