"""Lines of PTX that unpack codes and widen them, four at a time, where Triton's own code takes one after the other.

A string is compiled into a program as it is. Empty: the program uses plain Triton, as under its interpreter, which runs
no PTX, and for products in float32.
"""

from __future__ import annotations

import torch

_MASKS = {4: 0x0F0F0F0F, 2: 0x03030303}
_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
_HIGH = {torch.bfloat16: 0x43, torch.float16: 0x64}
"""High byte of the number whose last place is one: 128 in bfloat16, 1,024 in float16."""
_KIND = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


def split(width: int) -> str:
    """Return what turns four bytes into one register for each code of a byte, lowest bits first; 2 and 4 bits."""
    return " ".join(_take(width, place, f"${place}", f"${8 // width}") for place in range(8 // width))


def open_bytes(width: int, dtype: torch.dtype) -> str:
    """Return what turns four bytes into two registers for each code of a byte, widened as `widen` does; 2, 4 bits."""
    count = 8 // width
    steps = [
        f"{_take(width, place, 'code', f'${2 * count}')} {_widen('code', f'${2 * place}', f'${2 * place + 1}', dtype)}"
        for place in range(count)
    ]
    return _with_constants(width, dtype, " ".join(steps))


def widen(bits: int, dtype: torch.dtype) -> str:
    """Return what turns four uint8 codes into two registers with two numbers each: the codes less `2 ** (bits - 1)`.

    A code becomes the low byte of a number whose last place is one; that number and half the range are subtracted
    again. Both steps are exact. In bfloat16 the eighth bit of a code does not fit below 128: where it is set, 128 less
    is subtracted.
    """
    if bits == 8 and dtype == torch.bfloat16:
        return _widen_eight_bits()
    return _with_constants(bits, dtype, _widen("$2", "$0", "$1", dtype))


def _take(width: int, place: int, target: str, source: str) -> str:
    mask = f"and.b32 {target}, {{}}, 0x{_MASKS[width]:08X};"
    return mask.format(source) if place == 0 else f"shr.b32 {target}, {source}, {width * place}; {mask.format(target)}"


def _widen(source: str, first: str, second: str, dtype: torch.dtype) -> str:
    kind = _KIND[dtype]
    return (
        f"{_spread(source, first, second, _HIGH[dtype])} "
        f"fma.rn.{kind} {first}, {first}, one, offset; fma.rn.{kind} {second}, {second}, one, offset;"
    )


def _spread(source: str, first: str, second: str, high: int) -> str:
    """Return what puts each of four bytes below a byte that is `high`."""
    word = f"0x{high:02X}{high:02X}{high:02X}{high:02X}"
    return f"prmt.b32 {first}, {source}, {word}, 0x4140; prmt.b32 {second}, {source}, {word}, 0x4342;"


def _with_constants(bits: int, dtype: torch.dtype, steps: str) -> str:
    """Return the steps with the factor and the offset of their sums; sm_80 has no plain addition for bfloat16."""
    one = _ONE[dtype]
    offset = 0x8000 + (_HIGH[dtype] << 8) + (1 << (bits - 1))
    return (
        f"{{ .reg .b32 one, offset, code; mov.b32 one, 0x{one:04X}{one:04X}; "
        f"mov.b32 offset, 0x{offset:04X}{offset:04X}; {steps} }}"
    )


def _widen_eight_bits() -> str:
    steps = [
        f"and.b32 less, ${place}, 0x00800080; xor.b32 less, less, 0x43804380; and.b32 ${place}, ${place}, 0xFF7FFF7F; "
        f"fma.rn.bf16x2 ${place}, less, minus, ${place};"
        for place in (0, 1)
    ]
    spread = _spread("$2", "$0", "$1", _HIGH[torch.bfloat16])
    return f"{{ .reg .b32 less, minus; mov.b32 minus, 0xBF80BF80; {spread} {' '.join(steps)} }}"
