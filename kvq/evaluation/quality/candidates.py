"""The caches to evaluate: configurations of kvq, and the quantized caches of transformers beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, QuantizedCache
from transformers.cache_utils import Cache

from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.errors import EvaluationError
from kvq.layers.held_bytes import report_memory
from kvq.layers.quantized_layer import KVQLayer

PEERS: Mapping[str, Mapping[str, Any]] = {
    "transformers quanto 4": {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0},
    "transformers quanto 2": {"backend": "quanto", "nbits": 2, "axis_key": 0, "axis_value": 0},
    "transformers hqq 4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "transformers hqq 2": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
    "transformers fp8": {"backend": "fp8"},
}
"""transformers' own quantized caches, along the axis that lets them generate at any length and with the least error."""

PEER_WINDOW = 128
"""transformers' default of `residual_length`."""


@dataclass(frozen=True)
class Candidate:
    """One cache to be measured.

    Attributes:
        label: its name in the tables.
        build: makes an empty cache for a model.
        settings: the settings that it was made from, as plain values.
        is_peer: whether it is a cache of transformers.
        may_fail: whether a failure leaves it out, with its reason, instead of ending the run; as with a peer.
    """

    label: str
    build: Callable[[PreTrainedModel], Cache] = field(repr=False)
    settings: Mapping[str, Any]
    is_peer: bool = False
    may_fail: bool = False

    @property
    def digest(self) -> str:
        """A fingerprint of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def make_candidate(label: str, config: KVQCacheConfig) -> Candidate:
    """Return the candidate of one configuration."""
    return Candidate(label, lambda model: KVQ(config, model=model), config.to_dict())


def list_peers() -> Iterator[Candidate]:
    """Yield transformers' quantized caches; building one that this version lacks raises transformers' error."""
    for label, options in PEERS.items():
        yield Candidate(label, _peer_builder(options), {"transformers": dict(options)}, is_peer=True)


def choose_peers(names: Sequence[str]) -> list[Candidate]:
    """Return some of transformers' quantized caches.

    Args:
        names: their labels as a command line has them, such as `quanto-4`; one that is repeated counts once.

    Raises:
        EvaluationError: there is none of that name.
    """
    peers = {peer.label.removeprefix("transformers ").replace(" ", "-"): peer for peer in list_peers()}
    wrong = [name for name in names if name not in peers]
    if wrong:
        raise EvaluationError(f"peer {wrong[0]!r} is unknown; transformers has {', '.join(peers)}")
    return [peers[name] for name in dict.fromkeys(names)]


def _peer_builder(options: Mapping[str, Any]) -> Callable[[PreTrainedModel], Cache]:
    return lambda model: QuantizedCache(config=model.config, **options)


def find_window(candidate: Candidate, model: PreTrainedModel) -> int | None:
    """Return how many of the newest tokens, at most, no quantized layer of a cache replaces by their codes.

    None where the length of a step makes no difference: its own tokens are read from their codes too.
    """
    if candidate.is_peer:
        options = candidate.settings["transformers"]
        return None if options["backend"] == "fp8" else options.get("residual_length", PEER_WINDOW)
    layers = candidate.build(model).layers
    windows = (layer.settings.residual_length for layer in layers if isinstance(layer, KVQLayer))
    return min(windows, default=None)


def count_held_bytes(cache: Cache) -> int:
    """Return the bytes of the distinct storages that any cache of transformers or of ours holds."""
    if isinstance(cache, KVQ):
        return cache.memory().total_bytes
    return report_memory(cache.layers).total_bytes


def count_full_precision_bytes(cache: Cache, reference: Cache) -> int:
    """Return the bytes of the same tokens in full precision."""
    return cache.memory().full_precision_bytes if isinstance(cache, KVQ) else count_held_bytes(reference)


def history_errors(cache: Cache, reference: Cache, bins: int) -> list[float] | None:
    """Return the relative error of the states that attention reads, by distance from the newest token.

    Args:
        cache: the cache under test.
        reference: full precision, after the same tokens.
        bins: number of equal runs of tokens; the first run has the newest tokens.

    Returns:
        Root mean square error over that of the states, for each run, over all layers that have keys and values, as far
        back as full precision keeps them; None for a cache whose history cannot be read, or one that is not ours.
    """
    if not isinstance(cache, KVQ):
        return None
    wrong, total = torch.zeros(bins), torch.zeros(bins)
    filled = [(i, layer) for i, layer in enumerate(reference.layers) if getattr(layer, "keys", None) is not None]
    for index, layer in filled:
        for found, expected in zip(cache.materialize(index), (layer.keys, layer.values), strict=True):
            kept = min(found.shape[2], expected.shape[2])  # of a sliding layer the two may keep unequally many
            found, expected = found[:, :, -kept:], expected[:, :, -kept:]
            runs = zip(_runs_back(found - expected, bins), _runs_back(expected, bins), strict=True)
            for place, (difference, states) in enumerate(runs):
                wrong[place] += difference.float().square().sum().cpu()
                total[place] += states.float().square().sum().cpu()
    relative: list[float] = (wrong / total.clamp_min(1e-30)).sqrt().tolist()
    return relative


def _runs_back(states: torch.Tensor, bins: int) -> tuple[torch.Tensor, ...]:
    return states.flip(2).tensor_split(bins, dim=2)
