"""A plan as data, and how it shows itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvq.text_table import TextTable
from kvq.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("layers", "keys", "values", "heads x dim", "why", "held", "full precision")
TEXT_WIDTH = 160
"""Characters of a line of the table in `str` of a plan."""


@dataclass(frozen=True)
class SidePlan:
    """Keys or values of one layer.

    Attributes:
        num_heads: key-value heads (H).
        head_dim: elements of one head (D).
        backend: the backend that quantizes them; None: they stay in full precision, and so are the rest of the fields.
        nbits: bits per code.
        granularity: `per_token` or `per_channel`.
        group_length: elements that share a scale; None where the backend has a representation of its own.
        rotation: the rotation before quantizing.
        balance: how tokens are evened out before quantizing.
        clip: the part of each group's range that codes are spread over, or `none`.
        rounding: how codes are chosen, as `rounding_k` says; `nearest` for values.
        effective_bits: codes and metadata per stored element, without slack.
    """

    num_heads: int
    head_dim: int
    backend: str | None = None
    nbits: float | None = None
    granularity: str | None = None
    group_length: int | None = None
    rotation: str | None = None
    balance: str | None = None
    clip: str | None = None
    rounding: str | None = None
    effective_bits: float | None = None

    def __str__(self) -> str:
        if self.backend is None:
            return "full precision"
        group = f" by {self.group_length}" if self.group_length else ""
        clip = "none" if self.clip in (None, "none") else f"clip {self.clip}"
        named = (self.rotation, self.balance, clip, self.rounding)
        steps = "".join(f", {step}" for step in named if step not in (None, "none", "nearest"))
        return f"{self.backend} {self.nbits:g} bit {self.granularity}{group}{steps} ({self.effective_bits:.2f})"


@dataclass(frozen=True)
class LayerPlan:
    """One layer, with all rows of the batch; every number is in bytes.

    Attributes:
        layer_idx: index of the layer.
        kind: class of the layer in the cache.
        reason: why it is held like this.
        total_bytes: held right after the prompt.
        full_precision_bytes: held by `DynamicCache` of that model then.
        later_bytes: held some tokens later, see `CachePlan.horizon`.
        later_full_precision_bytes: held by `DynamicCache` of that model then.
        peak_bytes: the most held on the model's device up to then.
        offloaded_bytes: part of `total_bytes` that lies in the memory of the host, by `device="cpu"`.
        key, value: the two sides; None for a layer that gets no keys and values.
    """

    layer_idx: int
    kind: str
    reason: str
    total_bytes: int
    full_precision_bytes: int
    later_bytes: int
    later_full_precision_bytes: int
    peak_bytes: int
    offloaded_bytes: int = 0
    key: SidePlan | None = None
    value: SidePlan | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether any side is quantized."""
        return any(side is not None and side.backend is not None for side in (self.key, self.value))


@dataclass(frozen=True)
class CachePlan:
    """The bytes that a cache will hold after a prompt.

    Attributes:
        model: class of the model.
        context: tokens of the prompt, the same in each row.
        batch: rows.
        dtype: the dtype of weights and states.
        layers: one entry a layer of the cache.
        horizon: tokens generated after the prompt in `later_bytes` and `peak_bytes`; they open every chunk that the
            next ones fill.
        num_parameters: parameters of the model.
        weights_bytes: bytes of its weights.
        gpu_memory_bytes: bytes of the device, or None.
        largest_context: most tokens whose cache fits beside the weights, 0 if none do; None without `gpu_memory_bytes`.
        is_search_bounded: whether more would fit, but that was not looked for.
        unsupported: the states that cannot be quantized.
        warnings: reasons against this configuration for this model.
        notes: facts about these numbers.
        left_out: other uses of memory, which are not counted.
    """

    model: str
    context: int
    batch: int
    dtype: str
    layers: tuple[LayerPlan, ...]
    horizon: int
    num_parameters: int
    weights_bytes: int
    gpu_memory_bytes: int | None = None
    largest_context: int | None = None
    is_search_bounded: bool = False
    unsupported: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes held right after the prompt."""
        return self._sum("total_bytes")

    @property
    def full_precision_bytes(self) -> int:
        """Bytes held by `DynamicCache` of that model right after the prompt."""
        return self._sum("full_precision_bytes")

    @property
    def later_bytes(self) -> int:
        """Bytes held `horizon` tokens later."""
        return self._sum("later_bytes")

    @property
    def later_full_precision_bytes(self) -> int:
        """Bytes held by `DynamicCache` of that model `horizon` tokens later."""
        return self._sum("later_full_precision_bytes")

    @property
    def peak_bytes(self) -> int:
        """The most bytes held on the model's device up to `horizon` tokens after the prompt."""
        return self._sum("peak_bytes")

    @property
    def compression(self) -> float:
        """How many times smaller the cache is than `DynamicCache` right after the prompt."""
        return self.full_precision_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def fits(self) -> bool | None:
        """Whether weights and cache fit into the memory given; None where none is given."""
        if self.gpu_memory_bytes is None:
            return None
        return self.weights_bytes + self.peak_bytes <= self.gpu_memory_bytes

    def __str__(self) -> str:
        return "\n".join([self._table().draw(TEXT_WIDTH), *self.lines()])

    def to_table(self) -> Table:
        """Return the layers as a table of rich, equal layers in one row; rich comes with the extra `cli`.

        Raises:
            MissingExtraError: rich is not installed.
        """
        return self._table().to_rich()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        totals = ("total_bytes", "full_precision_bytes", "later_bytes", "later_full_precision_bytes", "peak_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in (*totals, "compression", "fits")}}

    def headline(self) -> str:
        """Return the result in one line."""
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        return (
            f"{self.context:,} tokens{rows}: {format_bytes(self.total_bytes)} held, "
            f"{format_bytes(self.full_precision_bytes)} in full precision: {format_ratio(self.compression)}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of `COLUMNS`, one row for all equal layers, with the bytes of all of them."""
        return [_row(group) for group in _groups(self.layers)]

    def lines(self) -> list[str]:
        """Return what there is to say beside the table, a sentence a line."""
        weights = f"weights: {self.num_parameters:,} parameters, {format_bytes(self.weights_bytes)} in {self.dtype}"
        lines = [weights, *self._memory_lines()]
        lines += [f"unsupported: {text}" for text in self.unsupported]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"note: {text}" for text in self.notes]
        return [*lines, f"left out: {'; '.join(self.left_out)}"] if self.left_out else lines

    def _table(self) -> TextTable:
        return TextTable(self.headline(), COLUMNS, tuple(self.rows()), right=frozenset({"held", "full precision"}))

    def _memory_lines(self) -> list[str]:
        if self.gpu_memory_bytes is None or self.largest_context is None:
            return []
        memory = format_bytes(self.gpu_memory_bytes)
        if self.weights_bytes > self.gpu_memory_bytes:
            return [f"{memory}: the weights alone do not fit"]
        least = "at least " if self.is_search_bounded else ""
        verdict = "fit" if self.fits else "do not fit"
        return [f"{memory}: {self.context:,} tokens {verdict}; the most that fit are {least}{self.largest_context:,}"]

    def _sum(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)


def join_layers(indices: list[int]) -> str:
    """Return numbers of layers in words, e.g. `0-3, 7`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _groups(layers: tuple[LayerPlan, ...]) -> list[list[LayerPlan]]:
    """Return layers that differ in their index only together, in the order of the first ones."""
    groups: dict[LayerPlan, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, layer_idx=0), []).append(layer)
    return list(groups.values())


def _row(group: list[LayerPlan]) -> tuple[str, ...]:
    one = group[0]
    return (
        join_layers([layer.layer_idx for layer in group]),
        str(one.key or "-"),
        str(one.value or "-"),
        _shape_text(one),
        one.reason,
        format_bytes(len(group) * one.total_bytes),
        format_bytes(len(group) * one.full_precision_bytes),
    )


def _shape_text(layer: LayerPlan) -> str:
    shapes = [f"{side.num_heads} x {side.head_dim}" for side in (layer.key, layer.value) if side is not None]
    return " / ".join(dict.fromkeys(shapes)) or "-"
