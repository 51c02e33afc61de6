"""From a layer's settings and the first states to the quantizer that its store uses."""

from __future__ import annotations

import math

import torch

from kvq.backend_spec import BackendSpec
from kvq.config import ResolvedLayer, ResolvedSide
from kvq.errors import BrokenBackendError, ConfigError, Fault, QuantizerContractError, StatesError
from kvq.granularity import Granularity
from kvq.quantizer import AffineQuantizer, Quantizer, QuantSpec, Side
from kvq.registry import get_registry
from kvq.store.affine import AffineCodec, balanced_group_length
from kvq.store.rotation import HadamardRotation

FULL_PRECISION_BITS = 16
"""Effective bits at which quantizing has lost its point."""
HALF_METADATA_MAX_BITS = 4
"""Widest codes whose error a float16 mid raises by less than a tenth at |mean| / std = 100; at 5 bits by up to 1.2."""
HALF_METADATA_MAX_LENGTH = 16
"""Groups shorter than this take float16 whatever the bits: float32 would cost them four bits an element and more."""


def build_codec(settings: ResolvedLayer, side: Side, layer_idx: int, states: torch.Tensor) -> Quantizer:
    """Build what quantizes one side of one layer.

    Args:
        settings: of the layer.
        side: keys or values.
        layer_idx: index of the layer.
        states: the first states, `[B, H, T, D]`, for their shape, dtype and device.

    Raises:
        BackendError: a requirement of the backend is missing or broken.
        ConfigError: the configuration makes no sense for these states.
        StatesError: the backend does not take states of this dtype or device.
        QuantizerContractError: the backend built something that is no quantizer.
    """
    chosen = settings.key if side == "key" else settings.value
    _check_states(chosen.backend, states)
    get_registry().check_requirements(chosen.backend)
    spec = _build_spec(chosen, side, layer_idx, states)
    try:
        quantizer = chosen.backend.build(spec, chosen.options)
    except ImportError as error:
        raise BrokenBackendError(
            f"backend {chosen.backend.name!r} is installed, but what it needs cannot be imported: {error}"
        ) from error
    codec = _wrap(quantizer, chosen, spec, settings.compute_dtype or torch.float32)
    _check_effective_bits(codec, chosen, side, spec.head_dim)
    return codec


def effective_bits(quantizer: Quantizer, head_dim: int) -> float:
    """Return the stored bits per element, codes and metadata, without slack."""
    block_bytes = sum(part.block_bytes for part in quantizer.layout().values())
    return 8 * block_bytes / (quantizer.block_length * head_dim)


def _build_spec(chosen: ResolvedSide, side: Side, layer_idx: int, states: torch.Tensor) -> QuantSpec:
    head_dim = states.shape[-1]
    per_token = chosen.granularity is Granularity.PER_TOKEN
    group_length = balanced_group_length(head_dim, chosen.group_size) if per_token else chosen.group_size
    half_suffices = math.ceil(chosen.nbits) <= HALF_METADATA_MAX_BITS or group_length < HALF_METADATA_MAX_LENGTH
    return QuantSpec(
        side=side,
        layer_idx=layer_idx,
        nbits=chosen.nbits,
        granularity=chosen.granularity,
        group_length=group_length,
        num_heads=states.shape[1],
        head_dim=head_dim,
        states_dtype=states.dtype,
        metadata_dtype=chosen.metadata_dtype or (torch.float16 if half_suffices else torch.float32),
        device=states.device,
        seed=2 * layer_idx + (side == "value"),
    )


def _wrap(quantizer: object, chosen: ResolvedSide, spec: QuantSpec, compute_dtype: torch.dtype) -> Quantizer:
    rotated = chosen.rotation == "hadamard"
    # A Quantizer has everything that an AffineQuantizer has, so the richer protocol is asked first.
    if isinstance(quantizer, Quantizer):
        if rotated:
            path = "rotation_k" if spec.side == "key" else "rotation_v"
            problem = f"{chosen.backend.name} stores its own representation, which the core cannot rotate; use 'none'"
            raise ConfigError([Fault((path,), problem)])
        return quantizer
    if isinstance(quantizer, AffineQuantizer):
        rotation = HadamardRotation(spec.head_dim, spec.seed, spec.device) if rotated else None
        return AffineCodec(quantizer, spec, rotation, compute_dtype)
    raise QuantizerContractError(
        f"{chosen.backend.name}: build returned {type(quantizer).__name__}, "
        "which has neither the methods of AffineQuantizer nor those of Quantizer"
    )


def _check_states(backend: BackendSpec, states: torch.Tensor) -> None:
    accepted = backend.capabilities
    dtype, device = str(states.dtype).removeprefix("torch."), states.device.type
    for kind, found, choices in (
        ("dtype", dtype, accepted.states_dtypes),
        ("device", device, accepted.device_types),
    ):
        if choices and found not in choices:
            raise StatesError(f"{backend.name}: states of {kind} {found!r} are not supported; it takes {choices}")


def _check_effective_bits(codec: Quantizer, chosen: ResolvedSide, side: Side, head_dim: int) -> None:
    bits = effective_bits(codec, head_dim)
    if bits >= FULL_PRECISION_BITS:
        problem = (
            f"{chosen.group_size} gives {bits:.1f} effective bits for the {side}s at head_dim={head_dim}, "
            "no less than full precision; choose larger groups or fewer bits"
        )
        raise ConfigError([Fault(("q_group_size",), problem)])
