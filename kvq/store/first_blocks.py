"""A look at the first blocks of a process, for numbers that no store could tell from good ones.

Codes beyond their width and metadata that is not finite would be packed and read back as garbage, in silence. A backend
that makes such is wrong from its first block on: one look a kind of quantizer is enough, and later blocks cost nothing
more. States that are not finite themselves are no backend's fault; the next block is looked at then.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer, QuantSpec
from kvq.store.declared_format import check_agreement

_seen: set[Hashable] = set()


def kind_of(backend: str, quantizer: object, spec: QuantSpec) -> Hashable:
    """Return what quantizers have in common that are right or wrong together."""
    groups = spec.nbits, spec.granularity, spec.group_length, spec.side
    return backend, type(quantizer), *groups, spec.states_dtype, spec.device.type


def check_first_codes(
    kind: Hashable, name: str, bits: int, encoded: tuple[torch.Tensor, torch.Tensor, torch.Tensor], lost: torch.Tensor
) -> None:
    """Look at what an affine quantizer returned, once a kind.

    Args:
        kind: the kind of quantizer, as `kind_of` returns it.
        name: the quantizer's name in errors.
        bits: bits of a code.
        encoded: codes `[..., G]`, scale and offset `[...]`, of the right shapes and dtypes.
        lost: bool `[...]`, the groups whose states are not finite, in whose place zeros were quantized.

    Raises:
        QuantizerContractError: a code has more bits, or a scale or an offset is not finite.
    """
    codes, scale, offset = encoded
    if kind in _seen or not codes.numel() or codes.device.type == "meta":
        return
    largest = int(codes.max())
    if largest >= 2**bits:
        raise QuantizerContractError(
            f"{name}.encode returned the code {largest}; with {bits} bits they go from 0 to {2**bits - 1}"
        )
    for what, numbers in (("scale", scale), ("offset", offset)):
        wrong = numbers[~numbers.isfinite()]
        if wrong.numel():
            raise QuantizerContractError(
                f"{name}.encode returned {wrong.numel()} of {numbers.numel()} values of {what} as {wrong[0]:g} or the "
                "like for finite groups; the contract is finite numbers, and scale 0 for a group without range"
            )
    if not lost.any():
        _seen.add(kind)


def check_first_blocks(
    kind: Hashable, name: str, quantizer: Quantizer, states: torch.Tensor, parts: Mapping[str, torch.Tensor]
) -> None:
    """Decode the first block that a quantizer of its own representation returned, once a kind.

    Args:
        kind: the kind of quantizer, as `kind_of` returns it.
        name: the quantizer's name in errors.
        quantizer: the quantizer that encoded them.
        states: `[B, H, T, D]`, as they were encoded.
        parts: the encoded blocks, of the shapes and dtypes of the layout.

    Raises:
        QuantizerContractError: finite states do not come back finite, or a format that the quantizer declares reads
            other numbers.
    """
    if kind in _seen or not states.numel() or states.device.type == "meta":
        return
    first = states[:1, :, : quantizer.block_length]
    if not first.isfinite().all():
        return
    restored, block = torch.empty_like(first), {part: tensor[:1, :, :1] for part, tensor in parts.items()}
    quantizer.decode_into(block, restored)
    if not restored.isfinite().all():
        raise QuantizerContractError(
            f"{name}.decode_into returned numbers that are not finite for the parts of a finite block"
        )
    packed = find_packed_format(quantizer)
    if packed is not None:
        check_agreement(name, quantizer, packed, block)
    _seen.add(kind)
