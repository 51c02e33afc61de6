"""The structures that the compiled kernel takes, as `attend.c` declares them."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch

TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3, torch.uint8: 4, torch.int8: 5}
"""As `attend.c` numbers them."""


class States(Structure):
    """Tokens in full precision, `[B, H, T, D]` with D contiguous; strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("length", c_int64),
    )


class PackedSegment(Structure):
    """The used blocks of one chunk."""

    _fields_ = (
        ("planes", c_void_p * 3),
        ("scale", c_void_p),
        ("mid", c_void_p),
        ("exponent", c_void_p),
        ("units", c_void_p),
        ("factor", c_void_p),
        ("rows", c_void_p),
        ("used", c_int64),
        ("capacity", c_int64),
    )


class PackedSide(Structure):
    """The store of one side: where its blocks lie, and what they mean."""

    _fields_ = (
        ("segments", POINTER(PackedSegment)),
        ("signs", c_void_p),
        ("levels", c_void_p),
        ("sources", c_void_p),
        ("factors", c_void_p),
        ("segment_count", c_int64),
        ("rotation_block", c_int64),
        ("head_dim", c_int64),
        ("states_dim", c_int64),
        ("block_length", c_int64),
        ("group_length", c_int64),
        ("groups", c_int64),
        ("bits", c_int64),
        ("plane_count", c_int64),
        ("widths", c_int64 * 3),
        ("per_channel", c_int64),
        ("scale_type", c_int64),
        ("mid_type", c_int64),
        ("shifts_mid", c_int64),
    )


class PackedRequest(Structure):
    """One call; see `AttentionRequest`."""

    _fields_ = (
        ("key", PackedSide),
        ("value", PackedSide),
        ("query", c_void_p),
        ("query_strides", c_int64 * 3),
        ("output", c_void_p),
        ("keys", States * 3),
        ("values", States * 3),
        ("sink_starts", c_void_p),
        ("sink_logits", c_void_p),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 4),
        ("mask_type", c_int64),
        ("is_causal", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("queries_per_head", c_int64),
        ("queries", c_int64),
        ("query_type", c_int64),
        ("key_type", c_int64),
        ("value_type", c_int64),
        ("stored", c_int64),
        ("tile_length", c_int64),
        ("splits", c_int64),
        ("threads", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("partial_sums", c_void_p),
        ("partial_state", c_void_p),
        ("finished", c_void_p),
        ("run_parallel", c_void_p),
    )


IN_ORDER = (States, PackedSegment, PackedSide, PackedRequest)
"""As `kvq_sizes` numbers them."""
