"""The case that a check runs on: one backend at one width in one direction, with its options.

Owns how a case becomes configurations, caches, quantizers and states. It must not know the checks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kvq.cache.kvq import KVQ
from kvq.calibration.calibration import STANDARD
from kvq.config import KVQCacheConfig
from kvq.errors import CheckNotApplicableError, ContractViolationError
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.quantizer_factory import build_codec
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.registry import get_registry

GROUP_SIZE = 64
HEAD_DIM = 64
RESIDUAL_LENGTH = 32
"""Tokens of the window in the caches of a case: few, for tokens to be stored early."""
STEPS = ("rotation_k", "rotation_v", "balance_k", "balance_v", "clip_k", "clip_v")
"""Fields of what the core does to states before a backend rounds them."""
PLAIN = dict.fromkeys(STEPS, "none")
"""The backend is tried on the states themselves: what the core does to them before has tests of its own."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ContractCase:
    """One backend, as a user would configure it; keys and values alike.

    Attributes:
        backend: the backend under test.
        nbits: bits per code.
        granularity: direction of the groups.
        options: the backend's options, as under `backend_options`.
    """

    backend: BackendSpec
    nbits: float
    granularity: Granularity
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        options = "".join(f"-{name}_{value}" for name, value in self.options.items())
        return f"{self.nbits:g}-{self.granularity}{options}"

    @property
    def device(self) -> torch.device:
        """The first device of this machine that the backend takes, the CPU before others.

        Raises:
            CheckNotApplicableError: this machine has none.
        """
        accepted = self.backend.capabilities.device_types or ("cpu",)
        for kind in sorted(accepted, key=lambda kind: kind != "cpu"):
            module = getattr(torch, kind, None)
            if kind == "cpu" or (module is not None and module.is_available()):
                return torch.device(kind)
        raise CheckNotApplicableError(
            f"{self.backend.name} takes states on {', '.join(accepted)}; none of them is here"
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of states that the backend takes, the most precise one first."""
        accepted = self.backend.capabilities.states_dtypes
        return tuple(dtype for dtype in _DTYPES if not accepted or str(dtype).removeprefix("torch.") in accepted)

    def config_fields(self, **fields: Any) -> dict[str, Any]:
        """Return the fields of a configuration of this case; keywords win."""
        own: dict[str, Any] = {
            "backend": self.backend,
            "nbits_k": self.nbits,
            "nbits_v": self.nbits,
            "axis_key": str(self.granularity),
            "axis_value": str(self.granularity),
            "q_group_size": GROUP_SIZE,
            "residual_length": RESIDUAL_LENGTH,
            **PLAIN,
        }
        if self.backend.calibration != "unused":
            own["calibration"] = STANDARD
        if self.options:
            own["backend_options"] = {self.backend.name: dict(self.options)}
        return {**own, **fields}

    def config(self, **fields: Any) -> KVQCacheConfig:
        """Return a configuration of this case; keywords win."""
        with warnings.catch_warnings():
            # The kit chooses the widths: a warning about them would tell the author of a backend nothing.
            warnings.simplefilter("ignore")
            return KVQCacheConfig(**self.config_fields(**fields))

    def cache(self, **fields: Any) -> KVQ:
        """Return an empty cache of this case; keywords are fields of its configuration."""
        return KVQ(self.config(**fields))

    def filled_cache(self, tokens: int, *, batch: int = 1, seed: int = 0, **fields: Any) -> KVQ:
        """Return a cache of one layer that holds random states."""
        cache = self.cache(**fields)
        feed(cache, self.states(tokens, batch=batch, seed=seed), self.states(tokens, batch=batch, seed=seed + 1))
        return cache

    def quantizer(
        self,
        side: Side = "key",
        layer_idx: int = 0,
        *,
        like: torch.Tensor | None = None,
        head_dim: int = HEAD_DIM,
        group_size: int = GROUP_SIZE,
        **fields: Any,
    ) -> Quantizer:
        """Build the codec that a cache would build for one side of one layer.

        Args:
            side: keys or values.
            layer_idx: index of the layer.
            like: states whose heads, head dim, dtype and device to take; default: those of `states`.
            head_dim: elements of one head of the default states.
            group_size: elements that share a scale.
            **fields: further fields of the configuration.
        """
        like = self.states(0, head_dim=head_dim) if like is None else like
        settings = self.config(q_group_size=group_size, **fields).for_layer(layer_idx)
        with warnings.catch_warnings():
            # The kit chooses the head: that little is saved of a short one says nothing about the backend.
            warnings.filterwarnings("ignore", message="q_group_size: ")
            return build_codec(settings, side, layer_idx, like)

    def states(
        self,
        tokens: int,
        *,
        batch: int = 1,
        heads: int = 2,
        head_dim: int = HEAD_DIM,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return standard normal states `[batch, heads, tokens, head_dim]` that the backend takes."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(batch, heads, tokens, head_dim, generator=generator)
        return states.to(self.device, self.dtypes[0] if dtype is None else dtype)

    def flush_length(self, head_dim: int = HEAD_DIM) -> int:
        """Return how many tokens a cache of this case quantizes at once."""
        cache = self.cache()
        empty = self.states(0, head_dim=head_dim)
        cache.update(empty, empty, 0)
        return quantized_layer(cache).flush_length

    def tokens_for(self, flushes: int) -> int:
        """Return how many tokens make a cache store so many flushes and leave some in an open window."""
        return RESIDUAL_LENGTH + flushes * self.flush_length() + 5


def list_cases(backend: BackendSpec | str, options: Mapping[str, Any] | None = None) -> list[ContractCase]:
    """Return a case for every width and direction that a backend offers.

    Args:
        backend: a spec, or the name of an installed or registered backend.
        options: the backend's options, as under `backend_options`.

    Raises:
        BackendError: the backend is unavailable.
    """
    spec = get_registry().get_backend(backend) if isinstance(backend, str) else backend
    offered = spec.capabilities
    return [
        ContractCase(spec, nbits, granularity, dict(options or {}))
        for nbits in offered.nbits
        for granularity in offered.granularities
    ]


def feed(cache: KVQ, keys: torch.Tensor, values: torch.Tensor, sizes: list[int] | None = None) -> None:
    """Feed states to layer 0 of a cache in updates of those sizes, without materializing the results."""
    for key_piece, value_piece in zip(split(keys, sizes), split(values, sizes), strict=True):
        if not cache.layers:
            cache.update(key_piece, value_piece, 0)
        else:
            quantized_layer(cache).update(key_piece, value_piece, packed=True)


def split(states: torch.Tensor, sizes: list[int] | None) -> Iterator[torch.Tensor]:
    """Yield states `[B, H, T, D]` in pieces of those sizes along the tokens; None: as a whole."""
    yield from states.split([states.shape[2]] if sizes is None else sizes, dim=2)


def encode_blocks(quantizer: Quantizer, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode whole blocks `[B, H, T, D]` as the store does: one at a time, and by row, unless they are independent."""
    if quantizer.group_local:
        return {name: part.clone() for name, part in quantizer.encode(states).items()}
    rows = []
    for row in states.split(1):
        blocks = [dict(quantizer.encode(block)) for block in row.split(quantizer.block_length, dim=2)]
        rows.append({name: torch.cat([block[name] for block in blocks], dim=2) for name in blocks[0]})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def quantized_layer(cache: KVQ, layer_idx: int = 0) -> KVQLayer:
    """Return a layer of a cache, which must be a quantized one."""
    layer: object = cache.layers[layer_idx]
    if not isinstance(layer, KVQLayer):
        raise ContractViolationError(f"layer {layer_idx} is not quantized")
    return layer


def require(condition: object, message: str) -> None:
    """Raise a violation with that message unless the condition holds."""
    if not condition:
        raise ContractViolationError(message)


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether shape, dtype and every bit of two tensors agree."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
