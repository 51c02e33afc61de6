"""The `PackedFormat` that a general quantizer declares: whether kernels can read what it stores by it.

A format that is declared is relied on: kernels read the parts without the quantizer. So it is checked when the
quantizer is built, against its spec and its layout, and with the first block of a process against `decode_into`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.hadamard import hadamard_block
from kvq.plugin_api.packed_format import CHANNEL_SOURCES, CODEBOOK, ROTATION_SIGNS, PackedFormat
from kvq.plugin_api.packing import MULTIPLE, plane_widths
from kvq.plugin_api.quantizer import Quantizer, QuantSpec
from kvq.store.origin import Origin
from kvq.store.packed_decoding import decode_packed
from kvq.store.rotation import HadamardRotation

TOLERANCE = 1e-3
"""Largest difference between both ways of reading, as a share of the largest number; rounding makes far less."""
LEAST_LEVEL, MOST_LEVEL = 2.0**-4, 2.0**14
"""Of the largest size of a number in a codebook: far from the ends of float16."""
_FLOATS = (torch.float16, torch.float32)


def read_declared(quantizer: Quantizer, spec: QuantSpec, origin: Origin) -> PackedFormat | None:
    """Return the format that a quantizer declares, or None if it declares none.

    Raises:
        QuantizerContractError: kernels could not read its parts by that format; the message lists every reason.
    """
    declared = getattr(quantizer, "packed_format", None)
    if declared is None:
        return None
    if not isinstance(declared, PackedFormat):
        raise QuantizerContractError(f"{origin}: packed_format is a {type(declared).__name__}, not a PackedFormat")
    faults = list(_find_faults(declared, spec, quantizer))
    if faults:
        raise QuantizerContractError(f"{origin}: packed_format cannot be read: {'; '.join(faults)}")
    return declared


def check_agreement(name: str, quantizer: Quantizer, packed: PackedFormat, parts: Mapping[str, torch.Tensor]) -> None:
    """Check that reading parts by their format gives the numbers of `decode_into`.

    Args:
        name: the quantizer's name in errors.
        quantizer: what encoded them.
        packed: the format that it declares.
        parts: one block of one row, of finite states.

    Raises:
        QuantizerContractError: it does not.
    """
    some = next(iter(parts.values()))
    head_dim = packed.states_dim or packed.head_dim
    expected = torch.empty((1, some.shape[1], packed.block_length, head_dim), device=some.device)
    found = torch.empty_like(expected)
    quantizer.decode_into(parts, expected)
    constants = quantizer.constants()
    rotation = HadamardRotation.of_signs(constants[ROTATION_SIGNS]) if packed.rotation_block else None
    decode_packed(packed, rotation, parts, found, constants)
    wrong, largest = (found - expected).abs(), expected.abs().max()
    if not wrong.max() <= TOLERANCE * largest:
        place = tuple(int(index) for index in torch.unravel_index(wrong.nan_to_num(torch.inf).argmax(), wrong.shape))
        raise QuantizerContractError(
            f"{name}: read by packed_format, {list(place)} is {float(found[place]):.6g}, and decode_into has "
            f"{float(expected[place]):.6g}: kernels would attend to other numbers; PackedFormat has the order of codes"
        )


def _find_faults(declared: PackedFormat, spec: QuantSpec, quantizer: Quantizer) -> Iterator[str]:
    if not 1 <= declared.bits <= 8 or declared.plane_widths != plane_widths(declared.bits):
        yield f"bits={declared.bits} and plane_widths={declared.plane_widths} are not those of `PackedFormat.of`"
        return
    for field, expected in _expectations(declared, spec, quantizer).items():
        found = getattr(declared, field)
        if found != expected:
            yield f"{field} is {found}, not {expected}"
    if declared.block_length % MULTIPLE:
        yield f"block_length={declared.block_length} is no multiple of {MULTIPLE}"
    yield from _find_metadata_faults(declared)
    yield from _find_rotation_faults(declared, quantizer)
    yield from _find_source_faults(declared, spec, quantizer)
    yield from _find_codebook_faults(declared, quantizer)
    if dict(quantizer.layout()) != declared.layout():
        yield f"layout returns {dict(quantizer.layout())}, and the format is {declared.layout()}"


def _expectations(declared: PackedFormat, spec: QuantSpec, quantizer: Quantizer) -> dict[str, object]:
    own: dict[str, object] = {
        "packed_dim": -1 if spec.side == "key" else -2,
        ("states_dim" if declared.states_dim else "head_dim"): spec.head_dim,
        "block_length": quantizer.block_length,
        "compute_dtype": torch.float32,
    }
    return {**own, "group_length": declared.block_length} if declared.per_channel else own


def _find_metadata_faults(declared: PackedFormat) -> Iterator[str]:
    dtypes = declared.scale_dtype, declared.mid_dtype
    if dtypes != (torch.uint8, torch.int8) and not (dtypes[0] in _FLOATS and dtypes[1] in (*_FLOATS, None)):
        yield f"scale and mid are {dtypes[0]} and {dtypes[1]}; kernels read float16, float32, or uint8 and int8"
    if declared.has_exponent and declared.scale_dtype is not torch.float16:
        yield "has_exponent goes with a scale in float16 alone"
    if declared.has_factor and not declared.per_channel:
        yield "has_factor goes with groups per channel alone"


def _find_rotation_faults(declared: PackedFormat, quantizer: Quantizer) -> Iterator[str]:
    if not declared.rotation_block:
        return
    if declared.rotation_block != hadamard_block(declared.head_dim):
        yield f"rotation_block is {declared.rotation_block}, not {hadamard_block(declared.head_dim)}"
    signs = quantizer.constants().get(ROTATION_SIGNS)
    if signs is None or not are_signs(signs, declared.head_dim):
        yield f"rotation_block asks for a constant {ROTATION_SIGNS!r}, int8 of head_dim elements, contiguous"


def _find_source_faults(declared: PackedFormat, spec: QuantSpec, quantizer: Quantizer) -> Iterator[str]:
    if not declared.states_dim:
        return
    if spec.side != "key" or declared.rotation_block:
        yield "states_dim goes with keys alone, and with states that are not rotated"
    sources = quantizer.constants().get(CHANNEL_SOURCES)
    shape = spec.num_heads, declared.head_dim
    if sources is None or sources.dtype is not torch.int32 or tuple(sources.shape) != shape:
        yield f"states_dim asks for a constant {CHANNEL_SOURCES!r}, int32 {list(shape)}"
    elif not are_sources(sources, declared.states_dim):
        yield f"{CHANNEL_SOURCES!r} has numbers that are no elements of a head of {declared.states_dim}"


def _find_codebook_faults(declared: PackedFormat, quantizer: Quantizer) -> Iterator[str]:
    if not declared.has_codebook:
        return
    levels = quantizer.constants().get(CODEBOOK)
    if levels is None or not is_codebook(levels, declared.bits):
        yield f"has_codebook asks for a constant {CODEBOOK!r}, float32 [{2**declared.bits}], contiguous"
    elif not levels.is_meta and not LEAST_LEVEL <= levels.abs().amax() <= MOST_LEVEL:  # NaN is neither
        yield (
            f"the largest number of {CODEBOOK!r} is {float(levels.abs().amax()):g}; kernels multiply in float16 too: "
            f"let it lie between {LEAST_LEVEL:g} and {MOST_LEVEL:g}, and give the rest to the scales"
        )


def is_codebook(levels: torch.Tensor, bits: int) -> bool:
    """Return whether a constant has a number for every code; what a file has need not."""
    return levels.dtype is torch.float32 and tuple(levels.shape) == (2**bits,) and levels.is_contiguous()


def get_codebook(packed: PackedFormat, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the constant that kernels look codes up in.

    Raises:
        QuantizerContractError: it lacks numbers, as one from a file may.
    """
    levels = constants[CODEBOOK]
    if not is_codebook(levels, packed.bits):
        raise QuantizerContractError(f"{CODEBOOK!r} is not float32 [{2**packed.bits}] and contiguous")
    return levels


def are_signs(signs: torch.Tensor, head_dim: int) -> bool:
    """Return whether a constant lies as kernels read signs; what a file has need not."""
    return signs.dtype is torch.int8 and tuple(signs.shape) == (head_dim,) and signs.is_contiguous()


def are_sources(sources: torch.Tensor, states_dim: int) -> bool:
    """Return whether all channels lead to elements that there are; what a file has need not."""
    return sources.is_meta or bool(((sources >= 0) & (sources < states_dim)).all())
