"""Layers that take tokens without data: the product's own layers on torch's meta device.

The same code as in a real cache decides when it allocates what, so there is no second set of formulas. Only the
quantizing itself is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from kvq.config import ResolvedLayer, ResolvedSide
from kvq.errors import ModelError
from kvq.layers.held_bytes import report_memory
from kvq.layers.memory_report import LayerMemory
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import carrier_of
from kvq.planning.layout_only import LayoutOnly
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.store.side_contents import SideContents
from kvq.transformers_seams.layer_kinds import Growth, kind_of, new_carrier

MAX_HORIZON = 512
"""Tokens that are rehearsed one at a time; of longer blocks the next flush may not be among them."""


@dataclass(frozen=True)
class Moments:
    """The bytes that a layer holds at two moments.

    Attributes:
        prompt: right after the prompt.
        later: after some more tokens, one at a time.
        peak_bytes: the most held on the model's device at any time up to then.
        offloaded_bytes: held in the memory of the host right after the prompt.
    """

    prompt: LayerMemory
    later: LayerMemory
    peak_bytes: int
    offloaded_bytes: int


class Rehearsal:
    """One layer of a cache, which can be filled any number of times.

    Args:
        layer: a layer of the cache, not yet filled: a `KVQLayer`, or one of transformers.
        outline: the layer of transformers' own cache after one token, on the meta device.

    Raises:
        KVQError: what the layer would raise at its first update.
        ModelError: it is a kind of layer whose growth is not known here.
    """

    def __init__(self, layer: Any, outline: Any) -> None:
        self.outline = outline
        self.kind = kind_of(outline)
        self.kept = self._find_kept(layer)
        self.quantized: KVQLayer | None = None
        self.is_offloaded = False
        if self.kind.growth is Growth.UNKNOWN:
            raise ModelError(
                f"layers of type {type(outline).__name__} hold more than keys and values, and how that grows is not "
                "known from the configuration alone; measure it with cache.memory()"
            )
        if isinstance(layer, KVQLayer) and self.states is not None:
            self.quantized = _build_quantized(layer, *self.states)
            self.is_offloaded = layer.settings.device is not None and layer.settings.device.type == "cpu"

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of one token, `[B, H, 1, D]` on the meta device; None where the layer gets none."""
        keys, values = getattr(self.outline, "keys", None), getattr(self.outline, "values", None)
        return None if keys is None or values is None else (keys, values)

    @property
    def horizon(self) -> int:
        """Tokens after which everything that generating allocates has been seen once, `MAX_HORIZON` at most."""
        return min(self.quantized.horizon, MAX_HORIZON) if self.quantized is not None else 1

    @property
    def signature(self) -> Hashable:
        """Equal for layers that hold equally many bytes after equally many tokens."""
        window = getattr(self.outline, "sliding_window", None)
        shapes = tuple((tuple(one.shape), one.dtype) for one in self.states or ())
        kind, held = (self.kind, type(self.kept)), _measure(self.outline).total_bytes
        return kind, window, shapes, held, self._quantized_signature()

    def _find_carried(self) -> Any:
        """Return a layer with what the outline holds beside keys and values of tokens, or None."""
        carried = new_carrier(self.outline)
        for name in kind_of(carried).states if carried is not None else ():
            held = getattr(self.outline, name, None)
            if isinstance(held, dict):
                setattr(carried, name, dict(held))
        return carried

    def _find_kept(self, layer: Any) -> Any:
        """Return the layer in full precision: transformers' own, or one that holds all tokens in its place."""
        if type(layer) is not DynamicLayer or type(self.outline) is DynamicLayer or self.states is None:
            return self.outline
        kept = DynamicLayer()
        kept.update(*self.states)
        return kept

    def run(self, context: int, horizon: int, *, full_precision: bool = False) -> Moments:
        """Fill the layer with a prompt and then token by token.

        Args:
            context: tokens of the prompt, at least 1.
            horizon: tokens after it, at least 1.
            full_precision: fill transformers' own layer instead.
        """
        plain = self.outline if full_precision else self.kept
        layer = self._renew() if self.quantized is not None and not full_precision else copy.deepcopy(plain)
        self._feed(layer, context - (0 if isinstance(layer, KVQLayer) else 1))
        prompt = _measure(layer)
        peak = max(map(self._own_bytes, (prompt, *self._measure_steps(layer, horizon))))
        return Moments(prompt, _measure(layer), peak, prompt.total_bytes - self._own_bytes(prompt))

    def _measure_steps(self, layer: Any, horizon: int) -> Iterator[LayerMemory]:
        """Feed a layer token by token and measure it whenever it holds other tensors, which few tokens bring about."""
        for _ in range(horizon):
            before = _contents_of(layer)
            self._feed(layer, 1)
            pairs = list(zip(before, _contents_of(layer), strict=True))
            if not pairs or not all(now.holds_tensors_of(old) for old, now in pairs):
                yield _measure(layer)

    def _own_bytes(self, memory: LayerMemory) -> int:
        """Return the bytes on the model's device."""
        return memory.total_bytes - (_chunk_bytes(memory) if self.is_offloaded else 0)

    def _feed(self, layer: Any, count: int) -> None:
        if self.states is None or self.kind.growth is Growth.FIXED or not count:
            return
        keys, values = (one.expand(-1, -1, count, -1) for one in self.states)
        if isinstance(layer, KVQLayer):
            layer.update(keys, values, packed=True)  # handles, which decode nothing
        else:
            layer.update(keys, values)
        indexer_keys = getattr(self.outline, "indexer_keys", None)
        if indexer_keys is not None:
            carrier_of(layer).update_indexer(indexer_keys.expand(-1, count, -1))

    def _quantized_signature(self) -> Hashable:
        if self.quantized is None:
            return None
        settings = self.quantized.settings
        parts = tuple(
            (
                tuple(sorted((name, part.shape, str(part.dtype)) for name, part in side.codec.layout().items())),
                side.codec.block_length,
                sum(constant.nbytes for constant in side.codec.constants().values()),
            )
            for _, side in self.quantized.sides()
        )
        waiting = settings.residual_length + self.quantized.flush_delay
        return parts, waiting, settings.sink_length, self.is_offloaded

    def _renew(self) -> KVQLayer:
        """Return the quantized layer with nothing in it, on the meta device."""
        built = self.quantized
        if built is None or self.states is None:
            raise ModelError(f"a layer of type {type(self.outline).__name__} gets no states")
        layer = built.emptied(carried=self._find_carried())
        codecs: dict[Side, Quantizer] = {name: LayoutOnly(side.codec) for name, side in built.sides()}
        layer.begin(codecs, {"key": self.states[0], "value": self.states[1]})
        layer.flush_delay = built.flush_delay  # what stands in for its quantizers has none of its own
        return layer


def _build_quantized(layer: KVQLayer, keys: torch.Tensor, values: torch.Tensor) -> KVQLayer:
    """Return a layer with the real quantizers for states like these, built on the CPU."""
    own = layer.emptied(_anywhere(layer.settings))
    own.padding = None
    empty = [torch.empty_like(one[:, :, :0], device="cpu") for one in (keys, values)]
    own.check_states(*empty)
    own.lazy_initialization(*empty)
    return own


def _anywhere(settings: ResolvedLayer) -> ResolvedLayer:
    """Return settings without what ties them to a device that need not be here."""
    return replace(settings, device=None, key=_on_cpu(settings.key), value=_on_cpu(settings.value))


def _on_cpu(side: ResolvedSide) -> ResolvedSide:
    accepted = side.backend.capabilities
    if not accepted.device_types or "cpu" in accepted.device_types:
        return side
    return replace(side, backend=replace(side.backend, capabilities=replace(accepted, device_types=())))


def _measure(layer: Any) -> LayerMemory:
    return report_memory([layer]).layers[0]


def _contents_of(layer: Any) -> list[SideContents]:
    """Return what the sides of a quantized layer hold now; nothing for a layer of transformers."""
    return [side.contents for _, side in layer.sides()] if isinstance(layer, KVQLayer) else []


def _chunk_bytes(memory: LayerMemory) -> int:
    return sum(side.chunk_bytes for side in (memory.key, memory.value) if side is not None)
