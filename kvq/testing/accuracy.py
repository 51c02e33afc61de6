"""Checks of the error against the bounds of information theory, which no code under test computes.

A code of R bits per element cannot bring the mean squared error of independent normal numbers below `4 ** -R` of their
variance (the distortion-rate function of a Gaussian source). Rounding evenly between the extremes of 64 of them loses
1.0 to 1.4 bits against that, symmetric rounding at 2 bits 1.9; any backend may lose `ALLOWED_LOSS_BITS`.
"""

from __future__ import annotations

import itertools
import math

import torch

from kvq.errors import CheckNotApplicableError
from kvq.layers.savings import effective_bits
from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer
from kvq.testing.case import ContractCase, encode_blocks, require
from kvq.testing.tensors import SIDES

ACCURACY_HEAD_DIM = 128
ACCURACY_TOKENS = 512
ALLOWED_LOSS_BITS = 2.0
LEAST_BITS = 2.0
"""Below, rounding to the extremes of a group is worse than storing nothing; only its own error bounds it there."""
SAMPLING_MARGIN = 0.9
"""Least error, as a share of Shannon's bound; a sample of a hundred thousand numbers stays above it."""
NOT_WORSE = 1.02


def check_accuracy(case: ContractCase) -> None:
    """The error on normal states is within two bits of the best possible code, and no code is better than possible."""
    for side in SIDES:
        for magnitude in (1.0, 1e-3, 1e3):
            quantizer = _build(case, side)
            bits = effective_bits(quantizer, ACCURACY_HEAD_DIM)
            error = _relative_error(quantizer, _states(case) * magnitude)
            shown = f"{side}s of magnitude {magnitude:g}: mean squared error {error:.3g} at {bits:.3f} effective bits"
            least, most = 4.0**-bits * SAMPLING_MARGIN, _largest_error(case, quantizer)
            require(error <= most, f"{shown}; at most {most:.3g} is accepted")
            require(error >= least, f"{shown}, but no code of that many bits is below {4.0**-bits:.3g}: more is stored")


def check_bias(case: ContractCase) -> None:
    """Channels far from zero, as keys have them, cost no more of the energy than normal states do."""
    for side in SIDES:
        states = _states(case)
        bias = 10 * _states(case, seed=1)[:, :, :1]
        quantizer = _build(case, side)
        error, most = _relative_error(quantizer, states + bias), _largest_error(case, quantizer)
        require(
            error <= most, f"biased {side}s: squared error {error:.3g} of their energy; at most {most:.3g} is accepted"
        )


def check_more_bits(case: ContractCase) -> None:
    """Every width of the backend is at least as accurate as the next smaller one."""
    widths = sorted(case.backend.capabilities.nbits)
    if len(widths) < 2:
        raise CheckNotApplicableError("one width only")
    for side in SIDES:
        errors = {}
        for nbits in widths:
            one = ContractCase(case.backend, nbits, case.granularity, case.options)
            errors[nbits] = _relative_error(_build(one, side), _states(case))
        for fewer, more in itertools.pairwise(widths):
            require(
                errors[more] <= errors[fewer] * NOT_WORSE,
                f"{side}s: {more:g} bits have an error of {errors[more]:.3g}, {fewer:g} bits of {errors[fewer]:.3g}",
            )


def _largest_error(case: ContractCase, quantizer: Quantizer) -> float:
    """Return the largest accepted squared error, as a share of the energy."""
    bits = effective_bits(quantizer, ACCURACY_HEAD_DIM)
    packed = find_packed_format(quantizer)
    if packed is not None:
        bits -= packed.bits - case.nbits  # two bits less the bits that a code of three levels uses
    if bits < LEAST_BITS:
        extreme = math.sqrt(2 * math.log(2 * ACCURACY_HEAD_DIM))  # about the largest of so many normal numbers
        return 1 + extreme**2 - 2 * extreme * math.sqrt(2 / math.pi)  # E(|x| - extreme)^2
    return float(4.0 ** (max(ALLOWED_LOSS_BITS, _range_bits(quantizer)) - bits))


def _range_bits(quantizer: Quantizer) -> float:
    """Return the bits of an element that encode its magnitude alone: the exponent of floating-point codes.

    One less than its width, since the first bit of the mantissa is implied.
    """
    for part in quantizer.layout().values():
        holds_elements = math.prod(part.shape) >= quantizer.block_length * ACCURACY_HEAD_DIM
        if part.dtype.is_floating_point and holds_elements:
            info = torch.finfo(part.dtype)
            return info.bits - 1 + math.log2(info.eps) - 1
    return 0.0


def _build(case: ContractCase, side: str) -> Quantizer:
    like = _states(case)[:, :, :0]
    return case.quantizer("key" if side == "key" else "value", like=like)


def _states(case: ContractCase, seed: int = 0) -> torch.Tensor:
    return case.states(ACCURACY_TOKENS, head_dim=ACCURACY_HEAD_DIM, seed=seed)


def _relative_error(quantizer: Quantizer, states: torch.Tensor) -> float:
    """Return the squared error as a share of the energy of states `[B, H, T, D]`, whole blocks of them."""
    whole = max(1, states.shape[2] // quantizer.block_length) * quantizer.block_length
    if whole > states.shape[2]:
        states = states.repeat(1, 1, -(-whole // states.shape[2]), 1)
    states = states[:, :, :whole]
    restored = torch.empty_like(states)
    quantizer.decode_into(encode_blocks(quantizer, states), restored)
    wrong = (restored.double() - states.double()).square().mean() / states.double().square().mean()
    return float(wrong)
