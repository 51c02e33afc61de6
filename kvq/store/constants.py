"""Giving a new quantizer the constants of the one that encoded the blocks of a store."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.quantizer import Quantizer
from kvq.store.affine import AffineCodec


def restore_constants(
    quantizer: Quantizer, constants: Mapping[str, torch.Tensor], like: torch.Tensor, *, settled: bool
) -> None:
    """Write constants into a quantizer that was just built, and check that it keeps them.

    Args:
        quantizer: the new quantizer; its constants have the names, shapes and dtypes of `constants`.
        constants: the constants of a quantizer built from the same spec, on any device.
        like: states `[B, H, T, D]` that give heads, head dim, dtype and device.
        settled: whether a block was encoded with them, after which they must not change.

    Raises:
        QuantizerContractError: it does not take them, or learns others from the next block that it encodes.
    """
    if not constants:
        return
    for name, tensor in quantizer.constants().items():
        if not _are_equal(tensor, constants[name]):  # quantizers may share what is the same for all of them
            tensor.copy_(constants[name])
    # What the core's own codec learns is in the metadata of each block: there is nothing to learn again.
    if settled and not isinstance(quantizer, AffineCodec):
        shape = (1, like.shape[1], quantizer.block_length, like.shape[3])
        ramp = torch.linspace(-1, 1, shape[1] * shape[2] * shape[3], device=like.device)
        quantizer.encode(ramp.reshape(shape).to(like.dtype))
    for name, tensor in quantizer.constants().items():
        if not _are_equal(tensor, constants[name]):
            raise QuantizerContractError(
                f"{type(quantizer).__name__} does not keep its constant {name!r} when it is given back: `constants` "
                "must return the tensors themselves, and what `encode` has learned must be in them alone"
            )


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Bit by bit: NaN then equals itself, and a dtype without comparison (float8) needs no exception.
    return torch.equal(*(tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
