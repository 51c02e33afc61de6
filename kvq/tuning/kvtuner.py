"""Reading the allocations that KVTuner publishes: bits of keys and values for each layer, in a YAML file.

A file of its `calibration_presets` maps the index of a layer to `nbits_key` and `nbits_value`, and says nothing else;
the way of quantizing is in the file's name, `kivi` or `pertoken`. Source: Li et al., "KVTuner: Sensitivity-Aware
Layer-wise Mixed Precision KV Cache Quantization", arXiv 2502.04420.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvq.config import KVQCacheConfig
from kvq.config.files import load_mapping
from kvq.errors import ConfigError, Fault
from kvq.tuning.search_space import DEFAULT_BACKEND
from kvq.tuning.side_setting import Pair, SideSetting, build_config

_BITS = ("nbits_key", "nbits_value")
_NO_STEPS = {"rotation": "none", "balance": "none"}
_WHOLE_HEAD = 65536
"""A group size of which groups inside tokens take as much as there is: they end with the head."""
SCHEMES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "defaults": ({}, {}, {}),
    "kivi": (
        {"axis": "per_channel", "group_size": 32, **_NO_STEPS},
        {"axis": "per_token", "group_size": 32, **_NO_STEPS},
        {"residual_length": 32, "sink_length": 0},
    ),
    "per-token": (
        {"axis": "per_token", "group_size": _WHOLE_HEAD, **_NO_STEPS},
        {"axis": "per_token", "group_size": _WHOLE_HEAD, **_NO_STEPS},
        {"residual_length": 0, "sink_length": 0},
    ),
}
"""Ways of quantizing by name: what differs from the defaults for keys, for values, and for all layers. `kivi` and
`per-token` are those that KVTuner's allocations were found for."""


def read_kvtuner(path: str | Path, *, scheme: str = "defaults", backend: str = DEFAULT_BACKEND) -> KVQCacheConfig:
    """Return the configuration that an allocation of KVTuner makes.

    Args:
        path: the YAML file.
        scheme: how to quantize, a key of `SCHEMES`.
        backend: the backend of all layers.

    Raises:
        ConfigError: the file cannot be read or holds something else, the scheme is unknown, or the backend does not
            have the bits.
        BackendError: the backend is unavailable.
    """
    if scheme not in SCHEMES:
        raise ConfigError([Fault(("scheme",), f"{scheme!r} is unknown; choose from {', '.join(SCHEMES)}")])
    bits = _check(load_mapping(path), str(path))
    keys, values, shared = SCHEMES[scheme]
    pairs = {
        index: Pair(SideSetting(backend, nbits_k, **keys), SideSetting(backend, nbits_v, **values))
        for index, (nbits_k, nbits_v) in bits.items()
    }
    return build_config(KVQCacheConfig(backend=backend).replace(**shared), pairs, len(pairs))


def _check(found: Mapping[Any, Any], source: str) -> dict[int, tuple[int, int]]:
    """Return the bits of each layer."""
    faults = [Fault((str(index),), problem) for index, own in found.items() if (problem := _find_problem(index, own))]
    if not faults and sorted(found) != list(range(len(found))):
        faults = [Fault((), "layers are missing: KVTuner names every layer, from 0 on")]
    if not found:
        faults = [Fault((), "no layer is named; give a file of KVTuner's calibration_presets")]
    if faults:
        raise ConfigError(faults, source)
    return {index: (own[_BITS[0]], own[_BITS[1]]) for index, own in sorted(found.items())}


def _find_problem(index: Any, own: Any) -> str | None:
    if not isinstance(index, int) or isinstance(index, bool):
        return "an index of a layer is needed as the key"
    if not isinstance(own, Mapping) or set(own) != set(_BITS):
        return f"exactly {' and '.join(_BITS)} are needed"
    if not all(isinstance(bits, int) and not isinstance(bits, bool) and bits > 0 for bits in own.values()):
        return "bits are whole numbers above 0"
    return None
