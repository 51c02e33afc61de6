"""Checks of a quantizer by itself: its input, its output, and that nothing else matters."""

from __future__ import annotations

import copy
import math

import torch

from kvq.errors import CheckNotApplicableError, ConfigError
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.store.affine import AffineCodec
from kvq.testing.case import ContractCase, encode_blocks, is_same, require

SHAPES = ((1, 1, 64), (2, 3, 80), (1, 2, 67), (2, 1, 128), (1, 1, 8))
"""Batch, heads and head dim of the states that a quantizer is tried with; it must accept a head of 64 or 128."""
BLOCKS = 3
LARGEST = 1e38
"""Twice this is still finite in float32, in which ranges are computed; float16 is tried up to its end."""
SIDES: tuple[Side, Side] = ("key", "value")


def check_layout(case: ContractCase) -> None:
    """For every shape and dtype, `encode` returns what `layout` announces and `decode_into` fills its output."""
    for batch, heads, head_dim in SHAPES:
        for dtype in case.dtypes:
            like = case.states(0, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)
            try:
                quantizer = case.quantizer(like=like)
            except ConfigError as error:
                require(head_dim not in (64, 128), f"a head of {head_dim} elements is refused: {error}")
                continue
            _check_one_layout(case, quantizer, like)


def check_codes(case: ContractCase) -> None:
    """An affine quantizer keeps codes below `2 ** ceil(nbits)`, and scale and offset finite, for any groups."""
    quantizer = case.quantizer()
    if not isinstance(quantizer, AffineCodec):
        raise CheckNotApplicableError("no affine quantizer: its codes are its own")
    length = quantizer.spec.group_length
    for name, groups in _list_groups(case, length).items():
        codes, scale, offset = quantizer.quantizer.encode(groups.reshape(-1, 1, length)[:, 0])
        limit = 2 ** math.ceil(case.nbits)
        require(codes.dtype is torch.uint8, f"codes are {codes.dtype}, not uint8")
        require(
            int(codes.max()) < limit, f"a code of {int(codes.max())} for {name}; {case.nbits:g} bits end at {limit - 1}"
        )
        for what, numbers in (("scale", scale), ("offset", offset)):
            require(numbers.dtype is torch.float32, f"{what} is {numbers.dtype}, not float32")
            require(numbers.isfinite().all(), f"{what} is not finite for {name}")


def check_input_untouched(case: ContractCase) -> None:
    """`encode` writes nothing into the states, and its results do not change with them later."""
    quantizer = case.quantizer()
    states = case.states((BLOCKS if quantizer.group_local else 1) * quantizer.block_length)
    kept = states.clone()
    parts = dict(quantizer.encode(states))
    require(is_same(states, kept), "encode wrote into the states that it was given")
    copies = {name: part.clone() for name, part in parts.items()}
    states.zero_()
    changed = [name for name, part in parts.items() if not is_same(part, copies[name])]
    require(not changed, f"{', '.join(changed)} share memory with the states that encode was given")
    out = torch.empty_like(kept)
    quantizer.decode_into(parts, out)
    changed = [name for name, part in parts.items() if not is_same(part, copies[name])]
    require(not changed, f"decode_into wrote into {', '.join(changed)}")


def check_non_contiguous(case: ContractCase) -> None:
    """Views with any strides give the same bits as contiguous states."""
    quantizer, states = _build(case)
    expected = encode_blocks(quantizer, states)
    for name, view in {
        "transposed": states.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": torch.stack([states, -states], dim=-1)[..., 0],
    }.items():
        found = encode_blocks(_build(case)[0], view)
        for part, tensor in expected.items():
            require(is_same(found[part], tensor), f"{name} states give other bits in {part!r} than contiguous ones")


def check_deterministic(case: ContractCase) -> None:
    """The same states give the same bits: again, from a second quantizer, and from a copy."""
    for side in SIDES:
        states = _states_of(case, case.quantizer(side))
        first = case.quantizer(side)
        expected = encode_blocks(first, states)
        for name, quantizer in {
            "again": first,
            "from a quantizer built alike": case.quantizer(side),
            "from a deep copy": copy.deepcopy(first),
        }.items():
            found = encode_blocks(quantizer, states)
            for part, tensor in expected.items():
                require(is_same(found[part], tensor), f"encoded {name}, {part!r} has other bits")


def check_finite(case: ContractCase) -> None:
    """Zeros come back as zeros; constants, tiny and extreme numbers come back finite."""
    for dtype in case.dtypes:
        quantizer = case.quantizer(like=case.states(0, dtype=dtype))
        states = _states_of(case, quantizer, dtype=dtype)
        largest, smallest = min(torch.finfo(dtype).max, LARGEST), torch.finfo(dtype).tiny
        for name, extreme in {
            "zeros": torch.zeros_like(states),
            "ones": torch.ones_like(states),
            "a large constant": torch.full_like(states, -1000.0),
            "the smallest numbers": states.sign() * smallest,
            "the largest numbers": states.sign() * largest,
            "one large number among small ones": torch.where(states == states.max(), largest, states * 1e-3),
        }.items():
            restored = _restore(quantizer, extreme)
            require(restored.isfinite().all(), f"{name} in {dtype} come back as numbers that are not finite")
            if name == "zeros":
                require(not restored.any(), f"zeros in {dtype} come back as up to {float(restored.abs().max()):.3g}")


def check_lost_numbers(case: ContractCase) -> None:
    """A state that is not finite reads back as NaN, never as a plausible number, and other blocks do not change."""
    for lost in (math.nan, math.inf):
        quantizer, states = _build(case)
        length = quantizer.block_length
        clean = _restore(quantizer, states)
        states[0, 1, length + 1, 5] = lost
        found = _restore(case.quantizer(), states)
        require(found[0, 1, length + 1, 5].isnan(), f"{lost} comes back as {float(found[0, 1, length + 1, 5]):.3g}")
        for name, others in (("blocks", (0, 1, slice(length))), ("heads", (0, 0))):
            require(is_same(found[others], clean[others]), f"{lost} in one block changes other {name}")


def check_decoding(case: ContractCase) -> None:
    """Any run of blocks decodes to the same numbers as within the whole, and every element of the output is written."""
    for side in SIDES:
        quantizer = case.quantizer(side)
        states = _states_of(case, quantizer, batch=2)
        parts, length = encode_blocks(quantizer, states), quantizer.block_length
        whole = _restore(quantizer, states)
        require(whole.isfinite().all(), "decode_into leaves elements of its output unwritten")
        for start, stop in ((0, 1), (1, BLOCKS), (BLOCKS - 1, BLOCKS)):
            around = torch.full_like(whole, math.nan)
            out = around[:, :, start * length : stop * length]
            quantizer.decode_into({name: part[:, :, start:stop] for name, part in parts.items()}, out)
            same = is_same(out, whole[:, :, start * length : stop * length])
            require(same, f"blocks {start} to {stop - 1} of the {side}s decode to other numbers than within the whole")
            others = torch.cat([around[:, :, : start * length], around[:, :, stop * length :]], dim=2)
            require(others.isnan().all(), "decode_into wrote beyond its output")


def check_constants(case: ContractCase) -> None:
    """Constants never change after the first block is encoded, and decoding needs nothing but them and the parts."""
    for side in SIDES:
        quantizer = case.quantizer(side)
        states = _states_of(case, quantizer)
        parts = encode_blocks(quantizer, states)
        kept = {name: tensor.clone() for name, tensor in quantizer.constants().items()}
        expected = torch.empty_like(states)
        quantizer.decode_into(parts, expected)
        encode_blocks(quantizer, states * 100)
        for name, tensor in quantizer.constants().items():
            require(is_same(tensor, kept[name]), f"constant {name!r} changed after the first block was encoded")
        other = case.quantizer(side)
        for name, tensor in other.constants().items():
            tensor.copy_(kept[name])
        found = torch.empty_like(states)
        other.decode_into(parts, found)
        require(is_same(found, expected), "a second quantizer with the same constants decodes to other numbers")


def _check_one_layout(case: ContractCase, quantizer: Quantizer, like: torch.Tensor) -> None:
    batch, heads, _, head_dim = like.shape
    states = _states_of(case, quantizer, batch=batch, heads=heads, head_dim=head_dim, dtype=like.dtype)
    layout = dict(quantizer.layout())
    parts = encode_blocks(quantizer, states)
    shown = f"states {list(states.shape)} of {states.dtype}"
    require(layout.keys() == parts.keys(), f"{shown}: encode returned {sorted(parts)}, the layout has {sorted(layout)}")
    require(dict(quantizer.layout()) == layout, "the layout changed after the first block")
    for name, part in layout.items():
        expected = (batch, heads, BLOCKS, *part.shape)
        tensor = parts[name]
        require(
            tuple(tensor.shape) == expected, f"{shown}: {name!r} has shape {list(tensor.shape)}, not {list(expected)}"
        )
        require(tensor.dtype is part.dtype, f"{shown}: {name!r} is {tensor.dtype}, the layout says {part.dtype}")
        require(tensor.device.type == states.device.type, f"{shown}: {name!r} is on {tensor.device}")
    restored = _restore(quantizer, states)
    require(restored.isfinite().all(), f"{shown}: decode_into leaves elements unwritten or not finite")


def _list_groups(case: ContractCase, length: int) -> dict[str, torch.Tensor]:
    """Return groups fp32 `[32, length]` of several kinds."""
    normal = case.states(32, heads=1, head_dim=length, dtype=torch.float32)[0, 0]
    return {
        "normal numbers": normal,
        "zeros": torch.zeros_like(normal),
        "a constant": torch.full_like(normal, 3.5),
        "large numbers": normal * 1e30,
        "tiny numbers": normal * 1e-30,
        "one outlier": torch.where(normal == normal.amax(-1, keepdim=True), 1e4, normal),
    }


def _build(case: ContractCase) -> tuple[Quantizer, torch.Tensor]:
    quantizer = case.quantizer()
    return quantizer, _states_of(case, quantizer)


def _states_of(
    case: ContractCase,
    quantizer: Quantizer,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return states of some blocks."""
    return case.states(BLOCKS * quantizer.block_length, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)


def _restore(quantizer: Quantizer, states: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(states, math.nan, memory_format=torch.contiguous_format)
    quantizer.decode_into(encode_blocks(quantizer, states), out)
    return out
