"""From a layer's settings and the first states to the quantizer that its store uses."""

from __future__ import annotations

import math
from typing import cast

import torch

from kvq.config import ResolvedLayer, ResolvedSide
from kvq.config.layer_config import BALANCE_FIELDS, CLIP_FIELDS, ROTATION_FIELDS
from kvq.errors import BackendFailedError, BrokenBackendError, ConfigError, Fault, StatesError
from kvq.layers.quantizer_kind import find_kind
from kvq.layers.savings import check_savings
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import AffineQuantizer, Quantizer, QuantSpec, Side
from kvq.registry import get_registry
from kvq.store.affine import AffineCodec, balanced_group_length
from kvq.store.guard import GuardedQuantizer
from kvq.store.origin import Origin
from kvq.store.rotation import HadamardRotation, rotation_block

HALF_METADATA_MAX_BITS = 4
"""Widest codes whose error a float16 mid raises by less than a tenth at |mean| / std = 100; at 5 bits by up to 1.2.

That holds where a group has two elements for each code value or more. The range of a shorter group, and with it the
step, is smaller: 4 bits in groups of 16 raise the error by 1.11, in groups of 8 by 1.26.
"""

BYTE_METADATA_MAX_BITS = 4
"""Widest codes whose scales may be bytes: these are off by up to 1.1 %, a twelfth of a step at the ends of 4 bits."""

LEAST_ROTATION_BLOCK = 16
"""Elements of a transform from which `auto` rotates: a shorter one spreads little."""

CLIP_SHARES = {2: 0.85, 3: 0.95}
"""The part of a range that `auto` keeps, by bits of a code; at four bits clipping changes nothing, at more it hurts."""


def build_codec(settings: ResolvedLayer, side: Side, layer_idx: int, states: torch.Tensor) -> Quantizer:
    """Build what quantizes one side of one layer.

    Args:
        settings: the layer's settings.
        side: keys or values.
        layer_idx: index of the layer.
        states: the first states, `[B, H, T, D]`, for their shape, dtype and device.

    Raises:
        BackendError: a requirement of the backend is missing or broken, or its own code raised.
        ConfigError: the configuration makes no sense for these states.
        StatesError: the backend does not take states of this dtype or device.
        QuantizerContractError: the backend built something that is not a quantizer.
    """
    chosen = settings.side(side)
    _check_states(chosen.backend, states)
    get_registry().check_requirements(chosen.backend)
    spec = _build_spec(chosen, side, layer_idx, states)
    quantizer = _build(chosen, spec)
    codec = _wrap(quantizer, chosen, spec, settings.compute_dtype or torch.float32)
    check_savings(codec, chosen, spec, settings.residual_length)
    return codec


def _build_spec(chosen: ResolvedSide, side: Side, layer_idx: int, states: torch.Tensor) -> QuantSpec:
    head_dim = states.shape[-1]
    per_token = chosen.granularity is Granularity.PER_TOKEN
    group_length = balanced_group_length(head_dim, chosen.group_size) if per_token else chosen.group_size
    bits = math.ceil(chosen.nbits)
    return QuantSpec(
        side=side,
        layer_idx=layer_idx,
        nbits=chosen.nbits,
        granularity=chosen.granularity,
        group_length=group_length,
        num_heads=states.shape[1],
        head_dim=head_dim,
        states_dtype=states.dtype,
        metadata_dtype=_find_metadata_dtype(chosen) or _default_mid_dtype(bits, group_length),
        device=states.device,
        seed=2 * layer_idx + (side == "value"),
    )


def _find_metadata_dtype(chosen: ResolvedSide) -> torch.dtype | None:
    """Return the dtype that was asked for, where it serves codes of this width."""
    is_too_narrow = chosen.metadata_dtype is torch.int8 and chosen.nbits > BYTE_METADATA_MAX_BITS
    return None if is_too_narrow else chosen.metadata_dtype


def _default_mid_dtype(bits: int, group_length: int) -> torch.dtype:
    half_suffices = bits <= HALF_METADATA_MAX_BITS and 2 ** (bits + 1) <= group_length
    return torch.float16 if half_suffices else torch.float32


def _build(chosen: ResolvedSide, spec: QuantSpec) -> object:
    origin = Origin.of(chosen.backend.name, spec)
    try:
        with origin.naming("build"):
            return chosen.backend.build(spec, chosen.options)
    except BackendFailedError as error:
        if isinstance(cause := error.__cause__, ImportError):
            raise BrokenBackendError(
                f"backend {chosen.backend.name!r} is installed, but a library that it needs cannot be imported: {cause}"
            ) from cause
        raise


def _wrap(quantizer: object, chosen: ResolvedSide, spec: QuantSpec, compute_dtype: torch.dtype) -> Quantizer:
    origin = Origin.of(chosen.backend.name, spec)
    if find_kind(quantizer, str(origin)) == "general":
        _check_untouched(chosen, spec.side)
        return GuardedQuantizer(cast(Quantizer, quantizer), origin, spec)
    rotation = HadamardRotation(spec.head_dim, spec.seed, spec.device) if _rotates(chosen, spec) else None
    # What a wide code demands of mid it does not demand of scale, whose error counts by the code, not by the mean.
    scale_dtype = _find_metadata_dtype(chosen) or torch.float16
    affine = cast(AffineQuantizer, quantizer)
    balanced = chosen.balance == "rms" or (chosen.balance == "auto" and spec.granularity is Granularity.PER_CHANNEL)
    return AffineCodec(
        affine,
        spec,
        rotation,
        compute_dtype,
        scale_dtype,
        chosen.backend.name,
        balanced=balanced,
        clip_share=_find_clip_share(chosen, spec, is_rotated=rotation is not None),
    )


def _find_clip_share(chosen: ResolvedSide, spec: QuantSpec, *, is_rotated: bool) -> float:
    if isinstance(chosen.clip, float):
        return chosen.clip
    # Without a rotation a group may have an outlier that matters more than all else in it.
    is_suited = chosen.clip == "auto" and is_rotated and spec.granularity is Granularity.PER_CHANNEL
    return CLIP_SHARES.get(math.ceil(spec.nbits), 1.0) if is_suited else 1.0


def _rotates(chosen: ResolvedSide, spec: QuantSpec) -> bool:
    if chosen.rotation != "auto":
        return chosen.rotation == "hadamard"
    # An offset that all channels share ends in one channel of a transform, where groups inside a token cannot hide it.
    return spec.granularity is Granularity.PER_CHANNEL and rotation_block(spec.head_dim) >= LEAST_ROTATION_BLOCK


def _check_untouched(chosen: ResolvedSide, side: Side) -> None:
    """Refuse what the core does to states before it groups them, where the quantizer stores its own representation."""
    given = {
        ROTATION_FIELDS[side]: (chosen.rotation, "rotate"),
        BALANCE_FIELDS[side]: (chosen.balance, "balance"),
        CLIP_FIELDS[side]: (chosen.clip, "clip"),
    }
    problem = "{} stores its own representation, which the core cannot {}; use 'none' or 'auto'"
    faults = [
        Fault((field,), problem.format(chosen.backend.name, verb))
        for field, (value, verb) in given.items()
        if value not in ("none", "auto")
    ]
    if faults:
        raise ConfigError(faults)


def _check_states(backend: BackendSpec, states: torch.Tensor) -> None:
    accepted = backend.capabilities
    dtype, device = str(states.dtype).removeprefix("torch."), states.device.type
    for kind, found, choices in (
        ("dtype", dtype, accepted.states_dtypes),
        ("device", device, accepted.device_types),
    ):
        if choices and found not in choices:
            raise StatesError(f"{backend.name}: states of {kind} {found!r} are not supported; it takes {choices}")
