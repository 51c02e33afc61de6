"""Build the codec that a cache would build, to measure its bits and to try it on one block.

Heavy: it imports torch and, through the backend, the vendor's library.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvq.calibration.calibration import STANDARD, StandardCalibration
from kvq.config import KVQCacheConfig, ResolvedLayer
from kvq.config.backend_defaults import find_group_size
from kvq.config.cache_config import DEFAULT_GROUP_SIZE
from kvq.config.field_types import SIDES
from kvq.errors import KVQError
from kvq.layers.quantizer_factory import build_codec
from kvq.layers.savings import effective_bits
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Quantizer, Side

HEAD_DIM = 128


def plain_settings(backend: BackendSpec, nbits: float, granularity: Granularity) -> ResolvedLayer:
    """Return the settings of a layer whose keys and values are quantized alike, everything else by default."""
    config = KVQCacheConfig(
        backend=backend,
        nbits_k=nbits,
        nbits_v=nbits,
        axis_key=granularity,
        axis_value=granularity,
        q_group_size=proposed_group_sizes(backend),
        calibration=None if backend.calibration == "unused" else STANDARD,
    )
    return config.for_layer(0)


def proposed_group_sizes(backend: BackendSpec) -> dict[str, int]:
    """Return the group size of each side where a user sets none."""
    return {side: find_group_size(backend, side, DEFAULT_GROUP_SIZE) for side in SIDES}


def measure_effective_bits(settings: ResolvedLayer, side: Side, head_dim: int = HEAD_DIM) -> float:
    """Return the bits per element that one side of a layer takes in the store; arguments as in `build_sample`."""
    return effective_bits(build_sample(settings, side, head_dim), head_dim)


def build_sample(settings: ResolvedLayer, side: Side, head_dim: int = HEAD_DIM) -> Quantizer:
    """Build what quantizes one side of a layer; its bytes are those of any model of that head, whatever its statistics.

    Args:
        settings: the layer's settings.
        side: keys or values.
        head_dim: elements of one head.

    Raises:
        KVQError: the codec cannot be built.
    """
    chosen = settings.side(side)
    states = make_states(chosen.backend, length=0, head_dim=head_dim)
    if chosen.calibration is not None:  # of heads of another length, maybe, and of more than one
        chosen = replace(chosen, calibration=StandardCalibration())
    return build_codec(replace(settings, key=chosen, value=chosen), side, 0, states)


def try_backend(backend: BackendSpec) -> None:
    """Quantize one block with a backend and read it back.

    Raises:
        KVQError: the result is not finite, or kvq refuses what the backend does.
        Exception: the backend or its library raises any error.
    """
    settings = plain_settings(backend, backend.capabilities.nbits[0], backend.capabilities.granularities[0])
    codec = build_codec(settings, "key", 0, make_states(backend, length=0))
    states = make_states(backend, length=codec.block_length)
    restored = torch.empty_like(states)
    codec.decode_into(codec.encode(states), restored)
    if not restored.isfinite().all():
        raise KVQError(f"backend {backend.name!r} returns numbers that are not finite for a block of random ones")


def make_states(backend: BackendSpec, *, length: int, head_dim: int = HEAD_DIM) -> torch.Tensor:
    """Return random states `[1, 1, length, head_dim]` of a dtype and on a device that the backend takes.

    Raises:
        KVQError: this machine has no device that the backend takes.
    """
    if not runs_here(backend):
        choices = ", ".join(backend.capabilities.device_types)
        raise KVQError(f"backend {backend.name!r} takes states on {choices}, and this machine has no such device")
    accepted = backend.capabilities
    dtype = getattr(torch, accepted.states_dtypes[0]) if accepted.states_dtypes else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, length, head_dim, generator=generator).to(_find_devices(backend)[0], dtype)


def runs_here(backend: BackendSpec) -> bool:
    """Return whether this machine has a device that the backend takes states on."""
    return bool(_find_devices(backend))


def _find_devices(backend: BackendSpec) -> list[str]:
    """Return the types of device that the backend takes and this machine has, the CPU first."""
    accepted = backend.capabilities.device_types or ("cpu",)
    return [device for device in sorted(accepted, key=lambda device: device != "cpu") if _is_here(device)]


def _is_here(device_type: str) -> bool:
    module = getattr(torch, device_type, None)
    return device_type == "cpu" or (module is not None and bool(module.is_available()))
