"""What the invariants are tested on: every backend at every width, and drawn shapes, states and splits.

The backends are read from the tree, not from what is installed, so that one that is added is tested from then on.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from reference_quantizers import NORM_CODEBOOK, STATIC_FLOAT8

from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api import BackendSpec, Granularity

ROOT = Path(__file__).parents[2]
OWN_BACKENDS = sorted(path.parent.name for path in (ROOT / "kvq_backends").glob("*/plugin.py"))
SOAK_FACTOR = 6

# Behind everything else: an installed template plugin wins over the one of the tree.
sys.path.append(str(ROOT / "plugins" / "kvq-template" / "src"))


def example_count(quick: int) -> int:
    """Return how many examples a test takes that has to do with `quick` of them in an ordinary run."""
    return quick * (SOAK_FACTOR if os.environ.get("KVQ_EXAMPLES") == "soak" else 1)


@dataclass(frozen=True, repr=False)
class Quantization:
    """One backend at one width in one pair of directions; both sides of a layer are quantized by it."""

    backend: BackendSpec
    nbits: float
    key_axis: Granularity = Granularity.PER_CHANNEL
    value_axis: Granularity = Granularity.PER_TOKEN
    is_affine: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def keeps_rows_apart(self) -> bool:
        """False where a constant is calibrated on the first block of the batch, which ties the other rows to row 0."""
        return self.backend is not STATIC_FLOAT8

    def __repr__(self) -> str:
        axes = f"-key_{self.key_axis}" if self.is_affine else ""
        options = "".join(f"-{name}_{value}" for name, value in self.options)
        return f"{self.name}-{self.nbits:g}{axes}{options}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis prints

    def block_length(self, side: str, group_size: int) -> int:
        """Return how many tokens of that side are packed together."""
        if not self.is_affine:
            return 16 if self.backend is STATIC_FLOAT8 else 1
        axis = self.key_axis if side == "key" else self.value_axis
        return group_size if axis is Granularity.PER_CHANNEL else 32


def load_spec(package: str) -> BackendSpec:
    return import_module(f"{package}.plugin").kvq_backend()


def list_quantizations() -> list[Quantization]:
    specs = [load_spec(f"kvq_backends.{name}") for name in OWN_BACKENDS] + [load_spec("kvq_template")]
    axes = (Granularity.PER_CHANNEL, Granularity.PER_TOKEN)
    # Crossed, so that two cases take each side through both directions.
    affine = [
        Quantization(spec, nbits, key_axis, value_axis)
        for spec in specs
        for nbits in spec.capabilities.nbits
        for key_axis, value_axis in (axes, axes[::-1])
    ]
    optional = [
        Quantization(spec, nbits, *axes, options=((name, value),))
        for spec in specs
        for name, value, widths in OTHER_WAYS.get(spec.name, ())
        for nbits in widths
    ]
    others = [Quantization(NORM_CODEBOOK, 4, is_affine=False), Quantization(STATIC_FLOAT8, 8, is_affine=False)]
    return affine + optional + others


OTHER_WAYS = {
    "quanto": [("symmetric_8bit", True, [8])],
    "hqq": [("optimize", False, [3])],
    "native": [("clip", "mse", [2, 8])],
}
"""Options under which a backend takes another path, and widths to try them at."""
QUANTIZATIONS = list_quantizations()
REPRESENTATIVES = {
    "hqq": {"hqq-1.58-key_per_token", "hqq-4-key_per_channel", "hqq-3-key_per_channel-optimize_False"},
    "native": {
        "native-1-key_per_token",
        "native-3-key_per_channel",
        "native-4-key_per_token",
        "native-7-key_per_token",
        "native-8-key_per_channel",
        "native-2-key_per_channel-clip_mse",
    },
    "quanto": {"quanto-4-key_per_channel", "quanto-8-key_per_channel-symmetric_8bit_True"},
    "template": {"template-5-key_per_token"},
}
"""Those that stand for all of a backend; a backend that is not named here is tested in full."""
COVERING = [q for q in QUANTIZATIONS if repr(q) in REPRESENTATIVES.get(q.name, {repr(q)})]
"""A few that differ in all that an invariant can see: one width packs, flushes and counts like its neighbours.

How near each width comes is tested on all of `QUANTIZATIONS`, and the state machines draw from all.
"""
HEAD_DIMS = [(8, 8), (48, 48), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}
GROUP_SIZES = st.sampled_from([8, 16, 24, 32, 64])
MANY_FLUSHES = 10
"""From so many on, chunks are opened with room for several flushes."""
MAX_ELEMENTS = 1 << 15
"""Elements of one side of a case, unless its flushes need more: so that none takes much longer than the others."""


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as integers, so that equal means equal bit for bit."""
    return tensor.contiguous().view(BITS_DTYPES[tensor.element_size()])


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether dtype, shape and every bit agree."""
    return one.dtype == other.dtype and torch.equal(bits_of(one), bits_of(other))


@dataclass(frozen=True)
class Case:
    """A layer to be built and the states that it is fed."""

    quantization: Quantization
    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    tokens: int
    residual_length: int
    sink_length: int
    padding: tuple[int, ...] | None
    group_sizes: tuple[int, int]
    rotations: tuple[str, str]
    balances: tuple[str, str]
    metadata: str | None
    magnitude: float
    bias: float
    seed: int

    def config(self) -> KVQCacheConfig:
        chosen = self.quantization
        return KVQCacheConfig(
            backend=chosen.backend,
            nbits_k=chosen.nbits,
            nbits_v=chosen.nbits,
            axis_key=chosen.key_axis,
            axis_value=chosen.value_axis,
            q_group_size={"key": self.group_sizes[0], "value": self.group_sizes[1]},
            residual_length=self.residual_length,
            sink_length=self.sink_length,
            rotation_k=self.rotations[0],
            rotation_v=self.rotations[1],
            balance_k=self.balances[0],
            balance_v=self.balances[1],
            metadata_dtype=self.metadata,
            backend_options={chosen.name: dict(chosen.options)} if chosen.options else {},
        )

    def layer(self, padding: tuple[int, ...] | None = None) -> KVQLayer:
        return KVQLayer(0, self.config().for_layer(0), padding or self.padding)

    def states(self, tokens: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values; channels have a bias of their own, mostly of one sign, as keys may."""
        generator = torch.Generator().manual_seed(2 * self.seed + 1_000_003 * seed)
        return tuple(
            self._side(dim, self.tokens if tokens is None else tokens, generator)
            for dim in (self.key_dim, self.value_dim)
        )

    def _side(self, dim: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(self.batch, self.heads, tokens, dim, generator=generator)
        bias = self.bias * (3 + torch.randn(1, self.heads, 1, dim, generator=generator))
        return ((noise + bias) * self.magnitude).to(self.dtype)

    @property
    def flush_length(self) -> int:
        """Tokens that leave the window together: whole blocks of both sides, at least 32."""
        chosen = self.quantization
        common = math.lcm(
            *(chosen.block_length(*pair) for pair in zip(("key", "value"), self.group_sizes, strict=True))
        )
        return common * math.ceil(32 / common)

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of the first real token of each row."""
        return self.padding or (0,) * self.batch


@st.composite
def cases(draw: Any, quantization: Quantization, flushes: tuple[int, int] = (1, 3)) -> Case:
    """Draw a case with that many flushes: at least the first number, at most the second.

    Many flushes are drawn of few elements each.
    """
    is_long = flushes[0] >= MANY_FLUSHES
    key_dim, value_dim = draw(st.sampled_from(HEAD_DIMS[:3] if is_long else HEAD_DIMS))
    batch = draw(st.integers(1, 2 if is_long else 8))
    heads = draw(st.integers(1, 3 if batch <= 2 else 1))
    rotations = st.sampled_from(["none", "hadamard"]) if quantization.is_affine else st.just("none")
    balances = [
        draw(st.sampled_from(["none", "rms"])) if quantization.is_affine and axis is Granularity.PER_CHANNEL else "none"
        for axis in (quantization.key_axis, quantization.value_axis)
    ]
    case = Case(
        quantization=quantization,
        batch=batch,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=draw(st.sampled_from(DTYPES)),
        tokens=0,
        residual_length=draw(st.sampled_from([0, 1, 7, 32, 50])),
        sink_length=draw(st.sampled_from([0, 1, 4, 40])),
        padding=draw(st.none() | st.tuples(*[st.sampled_from([0, 0, 1, 5, 33, 70]) for _ in range(batch)])),
        group_sizes=(draw(GROUP_SIZES), draw(GROUP_SIZES)),
        rotations=(draw(rotations), draw(rotations)),
        balances=(balances[0], balances[1]),
        metadata=draw(st.sampled_from([None, "int8"])),
        magnitude=draw(st.sampled_from([1.0, 1e-2, 30.0])),
        bias=draw(st.sampled_from([0.0, 3.0, 100.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    least, most = (case.residual_length + count * case.flush_length for count in (flushes[0], flushes[1] + 1))
    affordable = MAX_ELEMENTS // (batch * heads * max(key_dim, value_dim))
    tokens = draw(st.integers(max(1, least), max(1, least, min(most - 1, affordable))))
    return replace(case, tokens=tokens)


class Split(tuple[int, ...]):
    """Sizes of updates, shown with runs of equal ones abbreviated."""

    __slots__ = ()

    def __repr__(self) -> str:
        runs = [(size, len(list(run))) for size, run in groupby(self)]
        return " + ".join(f"[{size}]" + (f" * {count}" if count > 1 else "") for size, count in runs)


@st.composite
def splits(draw: Any, tokens: int) -> Split:
    """Draw the sizes of the updates that bring so many tokens; some may be empty."""
    style = draw(st.sampled_from(["cuts", "cuts", "prefill", "tokens"]))
    if style == "tokens":
        return Split([1] * tokens)
    if style == "prefill":
        first = draw(st.integers(0, tokens))
        steps = min(tokens - first, draw(st.integers(0, 70)))
        return Split([first, *[1] * steps, tokens - first - steps])
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=6)))
    return Split(stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True))


def pieces(states: tuple[torch.Tensor, ...], sizes: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the states as updates of those sizes."""
    assert sum(sizes) == states[0].shape[2]
    start = 0
    for size in sizes:
        yield tuple(side[:, :, start : start + size] for side in states)
        start += size


def feed(layer: KVQLayer, states: tuple[torch.Tensor, ...], sizes: Sequence[int] | None = None) -> KVQLayer:
    """Bring the states to a layer; what `update` returns is not materialized."""
    for piece in pieces(states, sizes or [states[0].shape[2]]):
        layer.update(*piece, packed=True)
    return layer


def stored_bytes(layer: KVQLayer) -> dict[tuple[str, str], torch.Tensor]:
    """Return a copy of the packed bytes by side and part, in order of blocks, without slack."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, side in layer.sides():
        for segment in side.store.segments:
            for part, tensor in segment.read(0, segment.used).items():
                found.setdefault((name, part), []).append(bits_of(tensor))
    return {key: torch.cat(tensors, dim=2) for key, tensors in found.items()}


def stored_length(layer: KVQLayer) -> int:
    """Return the number of quantized tokens."""
    return layer.side("key").store.length
