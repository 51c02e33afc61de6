"""What may be chosen: the settings of a side, the groups of layers that share one, and the layers left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from transformers import PreTrainedModel

from kvq.cache.kvq import KVQ
from kvq.config import PRESETS, KVQCacheConfig
from kvq.errors import EvaluationError
from kvq.layers.biased_keys import find_biased_keys
from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.registry import get_registry
from kvq.tuning.side_setting import Pair, SideSetting

DEFAULT_BACKEND: str = PRESETS["4bit"]["backend"]
DEFAULT_BITS = (1, 2, 3, 4, 5, 6, 8)
CLIPS: dict[float, tuple[str | float, ...]] = {2: ("auto", 0.75, 0.95), 3: ("auto", 0.9, "none"), 4: ("auto", 0.97)}
"""Clipping to choose from by bits, elsewhere `auto` alone: more of it, which suits most layers, and less,
for layers in which few large elements decide."""
METADATA = "int8"
"""`metadata_dtype` of candidates: up to 4 bits as good as others, in fewer bytes; wider codes keep the default."""


def default_base() -> KVQCacheConfig:
    """Return the settings that hold for all layers by default: those of a configuration, by the presets' backend."""
    return KVQCacheConfig(backend=DEFAULT_BACKEND)


@dataclass(frozen=True)
class Grid:
    """All combinations of some values; what a backend does not have is left out.

    Attributes:
        backends: names of backends.
        bits: bits per code.
        axes: granularities.
        group_sizes: elements per scale.
        rotations: as in a configuration.
        balances: as in a configuration.
        clips: as in a configuration; None: for the presets' backend those of `CLIPS`, else `auto`.
        metadata: `metadata_dtype` of a configuration, or `default`.
    """

    backends: Sequence[str] = (DEFAULT_BACKEND,)
    bits: Sequence[float] = DEFAULT_BITS
    axes: Sequence[str] = ("per_channel",)
    group_sizes: Sequence[int] = (64,)
    rotations: Sequence[str] = ("auto",)
    balances: Sequence[str] = ("auto",)
    clips: Sequence[str | float] | None = None
    metadata: Sequence[str] = (METADATA,)

    def settings(self) -> list[SideSetting]:
        """Return the settings that the backends have.

        Raises:
            EvaluationError: a backend has none of them.
            BackendError: a backend is unavailable.
        """
        found: dict[SideSetting, None] = {}
        for backend in dict.fromkeys(self.backends):
            spec = get_registry().get_backend(backend)
            own = list(self._settings_of(spec))
            if not own:
                raise EvaluationError(_describe_lack(spec, self))
            found |= dict.fromkeys(own)
        return list(found)

    def list_lacks(self) -> list[str]:
        """Return a line for each backend that lacks some of the bits or granularities.

        Raises:
            BackendError: a backend is unavailable.
        """
        found = []
        for backend in dict.fromkeys(self.backends):
            has = get_registry().get_backend(backend).capabilities
            lacks = [f"{bits:g} bits" for bits in self.bits if bits not in has.nbits]
            lacks += [axis for axis in self.axes if Granularity(axis) not in has.granularities]
            found += [f"{backend} has no {', '.join(lacks)}"] if lacks else []
        return found

    def _settings_of(self, spec: BackendSpec) -> Iterator[SideSetting]:
        has = spec.capabilities
        shapes = product(self.bits, self.axes, self.group_sizes, self.rotations, self.balances, self.metadata)
        for bits, axis, size, rotation, balance, metadata in shapes:
            if bits in has.nbits and Granularity(axis) in has.granularities:
                for clip in self._clips_of(spec, bits):
                    yield SideSetting(spec.name, bits, axis, size, rotation, balance, clip, metadata)

    def _clips_of(self, spec: BackendSpec, bits: float) -> Sequence[str | float]:
        if self.clips is not None:
            return self.clips
        return CLIPS.get(bits, ("auto",)) if spec.name == DEFAULT_BACKEND else ("auto",)


@dataclass(frozen=True)
class SearchSpace:
    """What an allocation chooses from.

    Attributes:
        keys: settings of the keys.
        values: settings of the values.
        groups: the layers that are quantized, those that share a setting together.
        kept: layers that stay in full precision although they could be quantized.
        most_pairs: most different pairs of settings in one configuration; None: any number.
    """

    keys: tuple[SideSetting, ...]
    values: tuple[SideSetting, ...]
    groups: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...] = ()
    most_pairs: int | None = None

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of settings that a configuration can say."""
        every = [Pair(key, value) for key in self.keys for value in self.values]
        return [pair for pair in every if pair.is_possible]

    @property
    def layers(self) -> list[int]:
        """The layers that are quantized."""
        return [index for group in self.groups for index in group]


def find_quantizable(model: PreTrainedModel, base: KVQCacheConfig) -> list[int]:
    """Return the layers of a model that a cache would quantize.

    Raises:
        ModelError: there are none.
    """
    return [index for index, layer in enumerate(KVQ(base, model=model).layers) if isinstance(layer, KVQLayer)]


def widen_for_biases(grid: Grid, model: PreTrainedModel) -> Grid:
    """Return the grid with the default metadata beside bytes where the model's keys have a large bias.

    Bytes may be too coarse for the middles of such keys, so both are measured.
    """
    if tuple(grid.metadata) != (METADATA,) or not find_biased_keys(model):
        return grid
    return replace(grid, metadata=(METADATA, "default"))


def group_layers(
    layers: Sequence[int], *, together: int = 1, keep_first: int = 0, keep_last: int = 0
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return groups of neighbouring layers, and the layers that are kept in full precision.

    Args:
        layers: the layers that could be quantized.
        together: layers of a group.
        keep_first: how many of the first ones are kept.
        keep_last: how many of the last ones are kept.

    Raises:
        EvaluationError: nothing is left to quantize.
    """
    rest = list(layers)[keep_first : len(layers) - keep_last]
    if not rest:
        raise EvaluationError(
            f"--keep-first {keep_first} and --keep-last {keep_last} leave none of the {len(layers)} layers to quantize"
        )
    groups = tuple(tuple(rest[start : start + together]) for start in range(0, len(rest), together))
    return groups, tuple(index for index in layers if index not in rest)


def _describe_lack(spec: BackendSpec, grid: Grid) -> str:
    has = spec.capabilities
    return (
        f"backend {spec.name!r} has none of the candidates: it takes {_join(has.nbits)} bits "
        f"{' or '.join(map(str, has.granularities))}, asked for were {_join(grid.bits)} {' or '.join(grid.axes)}"
    )


def _join(bits: Sequence[float]) -> str:
    return ", ".join(f"{one:g}" for one in bits)
