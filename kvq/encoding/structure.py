"""The structure that the compiled code takes, as `encode.c` declares it."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int64, c_void_p

import torch

TYPE_NUMBERS: dict[torch.dtype | None, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 4,
    torch.int8: 5,
}
"""As `encode.c` numbers them."""
WHOLE, PREPARE, STORE, DECODE = 0, 1, 2, 3
"""Stages: from states to parts; to the groups that a quantizer is given; from what it says to parts; and from parts to
states."""


class EncodeRequest(Structure):
    """One call: blocks of states, the format of their parts, and where these lie."""

    _fields_ = (
        ("states", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("states_type", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("blocks", c_int64),
        ("head_dim", c_int64),
        ("block_length", c_int64),
        ("group_length", c_int64),
        ("groups", c_int64),
        ("per_channel", c_int64),
        ("packs_rows", c_int64),
        ("bits", c_int64),
        ("plane_count", c_int64),
        ("widths", c_int64 * 3),
        ("signs", c_void_p),
        ("rotation_block", c_int64),
        ("has_factor", c_int64),
        ("clips", c_int64),
        ("scale_type", c_int64),
        ("mid_type", c_int64),
        ("has_exponent", c_int64),
        ("shifts_mid", c_int64),
        ("has_units", c_int64),
        ("rotation_scale", c_float),
        ("clip_margin", c_float),
        ("inverse_factors", c_void_p),
        ("factor_bounds", c_void_p),
        ("scale_bounds", c_void_p),
        ("factors", c_void_p),
        ("row_blocks", c_int64),
        ("head_blocks", c_int64),
        ("planes", c_void_p * 3),
        ("scale", c_void_p),
        ("mid", c_void_p),
        ("exponent", c_void_p),
        ("units", c_void_p),
        ("factor", c_void_p),
        ("group_values", c_void_p),
        ("lost", c_void_p),
        ("codes", c_void_p),
        ("said_scale", c_void_p),
        ("said_offset", c_void_p),
        ("order", c_void_p),
        ("weights", c_void_p),
        ("stage", c_int64),
        ("threads", c_int64),
        ("run_parallel", c_void_p),
    )
