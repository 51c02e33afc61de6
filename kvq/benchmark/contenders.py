"""The caches to compare: full precision in three forms, transformers' quantized caches, and kvq's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import DynamicCache, PretrainedConfig, QuantizedCache
from transformers.cache_utils import Cache

from kvq.attention import ATTENTION_NAME
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.benchmark.baselines import PACKED_ATTENTION, build_buffer_cache
from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.evaluation.quality.candidates import PEERS

Kind = Literal["full precision", "transformers", "kvq"]

DYNAMIC = "DynamicCache"
DYNAMIC_PACKED = "DynamicCache, packed queries"
BUFFER = "buffer, packed queries"
"""The baseline of every ratio: the fastest full precision in plain torch."""
SDPA = "sdpa"
FORMS = (("fused", ATTENTION_NAME, None), ("eager", ATTENTION_NAME, REFERENCE.name), ("materialized", SDPA, None))
"""How a cache of ours is read: label, attention implementation and kernel."""


@dataclass(frozen=True)
class Contender:
    """A cache together with the attention that reads it.

    Attributes:
        label: its name in the tables.
        kind: the group that it belongs to.
        attention: the attention implementation, by its name in transformers.
        build: makes an empty cache for a model of this configuration, preallocated for that many tokens if it can.
        settings: the settings that it was made from, as plain values.
        kernel: name of the kernel that must read it; None: the default of this machine.
    """

    label: str
    kind: Kind
    attention: str
    build: Callable[[PretrainedConfig, int], Cache] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    kernel: str | None = None

    @property
    def is_variant(self) -> bool:
        """Whether it is a cache of ours that is read in another way than the default of "kvq" attention."""
        return self.kind == "kvq" and (self.attention != ATTENTION_NAME or self.kernel is not None)


@dataclass(frozen=True)
class ContenderChoice:
    """The contenders of a run, as plain values, from which another process makes the same ones.

    Attributes:
        configs: configurations of ours by label, as mappings.
        bits: bits of the peers.
        peers: whether transformers' quantized caches are among them.
    """

    configs: Mapping[str, Mapping[str, Any]]
    bits: int = 4
    peers: bool = True

    def contenders(self) -> list[Contender]:
        """Return all contenders, in the order of the tables."""
        configs = {label: KVQCacheConfig.from_mapping(fields) for label, fields in self.configs.items()}
        return [*list_baselines(), *(list_peers(self.bits) if self.peers else ()), *list_own(configs)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which another process makes the same choice."""
        return {"configs": dict(self.configs), "bits": self.bits, "peers": self.peers}


def list_baselines() -> Iterator[Contender]:
    """Yield full precision: transformers' own, with packed queries, and in a preallocated buffer."""
    yield Contender(DYNAMIC, "full precision", SDPA, _build_dynamic)
    yield Contender(DYNAMIC_PACKED, "full precision", PACKED_ATTENTION, _build_dynamic)
    yield Contender(BUFFER, "full precision", PACKED_ATTENTION, build_buffer_cache)


def list_peers(nbits: int) -> Iterator[Contender]:
    """Yield transformers' quantized caches of that many bits, and those with a fixed number of bits."""
    for label, options in PEERS.items():
        if options.get("nbits", nbits) == nbits:
            yield Contender(label, "transformers", SDPA, _peer_builder(options), {"transformers": dict(options)})


def list_own(configs: Mapping[str, KVQCacheConfig]) -> Iterator[Contender]:
    """Yield each configuration read packed and materialized for SDPA; the first one is read by the reference too."""
    for number, (label, config) in enumerate(configs.items()):
        for form, attention, kernel in FORMS:
            if kernel is None or number == 0:
                build, settings = _own_builder(config), config.to_dict()
                yield Contender(f"kvq {label}, {form}", "kvq", attention, build, settings, kernel)


def backend_configs(backends: Sequence[str], nbits: int) -> dict[str, KVQCacheConfig]:
    """Return the default configuration of each backend at that many bits for both sides.

    Raises:
        ConfigError: a backend does not have these bits.
        BackendError: there is no such backend.
    """
    return {f"{name} {nbits}": KVQCacheConfig(backend=name, nbits_k=nbits, nbits_v=nbits) for name in backends}


def _build_dynamic(config: PretrainedConfig, capacity: int) -> Cache:
    del capacity
    return DynamicCache(config=config)


def _peer_builder(options: Mapping[str, Any]) -> Callable[[PretrainedConfig, int], Cache]:
    return lambda config, capacity: QuantizedCache(config=config, **options)  # noqa: ARG005


def _own_builder(config: KVQCacheConfig) -> Callable[[PretrainedConfig, int], Cache]:
    return lambda model_config, capacity: KVQ(config, model=model_config)  # noqa: ARG005
