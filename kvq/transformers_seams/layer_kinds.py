"""The kinds of layers in transformers' caches, one row a kind: all that kvq knows of a class of layers stands here.

A class without a row, which a model may define in its own file, has the states of the listed kinds that it inherits
from. It is kept as transformers made it, copied as a whole, and refused in files and in plans. It must not know kvq's
own layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import cache_utils


class Growth(Enum):
    """How much more a layer holds after more tokens."""

    BY_UPDATE = "what `update` adds, and nothing else"
    FIXED = "nothing more"
    UNKNOWN = "not known without running the model"


class Replaced(Enum):
    """When a cache puts a quantized layer in the place of transformers' one."""

    ALWAYS = "unless the configuration keeps it in full precision"
    ON_REQUEST = "if the configuration says so, or if nothing else would be quantized"
    NEVER = "never"


class _Missing:
    """Stands for a class that this release of transformers lacks; no layer is one."""


@dataclass(frozen=True)
class LayerKind:
    """One class of layers.

    Attributes:
        layer_class: the class itself; a subclass is another kind.
        reason: why a cache holds such a layer as transformers made it; `{window}` stands for its sliding window.
        states: the attributes that hold a row for each row of the batch, tensors or mappings of tensors.
        growth: the growth with more tokens.
        replaced: when a quantized layer takes its place.
        slides: whether it forgets the tokens behind a sliding window, `sliding_window` tokens long.
        is_never_written: whether its tensors are replaced by new ones and never written to: forks share them.
        form_in_files: the `kind` of its header in saved caches; None: no file can hold it.
        unsupported: the states that kvq never quantizes, under any configuration; empty: none.
        carried_in_files: the `kind` of the header of what it has beside keys and values; None: it has nothing.
        carrier: the class that holds what such a layer has beside keys and values, for the quantized layer in its
            place; None: it has nothing.
    """

    layer_class: type
    reason: str
    states: tuple[str, ...] = ()
    growth: Growth = Growth.UNKNOWN
    replaced: Replaced = Replaced.NEVER
    slides: bool = False
    is_never_written: bool = False
    form_in_files: str | None = None
    unsupported: str = ""
    carried_in_files: str | None = None
    carrier: type | None = None

    @property
    def holds_tokens(self) -> bool:
        """Whether it holds keys and values of tokens."""
        return "keys" in self.states

    @property
    def beside(self) -> str:
        """What stays in full precision beside quantized keys and values, in words; empty: nothing."""
        return "" if self.carrier is None else f"{self.unsupported} stay in full precision"

    @property
    def holds_sums(self) -> bool:
        """Whether it may hold a state that sums up all tokens, from which no crop can take one back."""
        return "recurrent_states" in self.states


_FULL_PRECISION = "dynamic"
_TOKENS = ("keys",)
_LINEAR = ("conv_states", "recurrent_states")
_INDEXER = ("indexer_keys",)
_LINEAR_STATES = "the states of linear attention"
_INDEXER_KEYS = "the keys of the indexers of sparse attention"
_LISTED = (
    LayerKind(
        cache_utils.DynamicLayer,
        reason="kept by transformers",
        states=_TOKENS,
        growth=Growth.BY_UPDATE,
        replaced=Replaced.ALWAYS,
        is_never_written=True,
        form_in_files=_FULL_PRECISION,
    ),
    LayerKind(
        cache_utils.DynamicSlidingWindowLayer,
        reason="sliding window of {window} tokens, kept by transformers",
        states=_TOKENS,
        growth=Growth.BY_UPDATE,
        replaced=Replaced.ON_REQUEST,
        slides=True,
        is_never_written=True,
        form_in_files="sliding",
    ),
    LayerKind(
        cache_utils.DynamicIndexedLayer,
        reason="sparse attention with an indexer, kept by transformers",
        states=_TOKENS + _INDEXER,
        growth=Growth.BY_UPDATE,
        replaced=Replaced.ALWAYS,
        is_never_written=True,
        form_in_files=_FULL_PRECISION,
        unsupported=_INDEXER_KEYS,
        carried_in_files="indexed",
        carrier=cache_utils.DynamicIndexedLayer,
    ),
    LayerKind(
        cache_utils.LinearAttentionLayer,
        reason="linear attention, a state of fixed size",
        states=_LINEAR,
        growth=Growth.FIXED,
        form_in_files="linear",
        unsupported=_LINEAR_STATES,
        carried_in_files="linear",
    ),
    LayerKind(
        cache_utils.LinearAttentionAndFullAttentionLayer,
        reason="linear and full attention in one layer, kept by transformers",
        states=_TOKENS + _LINEAR,
        growth=Growth.BY_UPDATE,
        replaced=Replaced.ALWAYS,
        form_in_files=_FULL_PRECISION,
        unsupported=_LINEAR_STATES,
        carried_in_files="linear",
        carrier=cache_utils.LinearAttentionLayer,
    ),
    LayerKind(
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
        reason="linear and sliding attention in one layer",
        states=_TOKENS + _LINEAR,
        growth=Growth.BY_UPDATE,
        slides=True,
        form_in_files="sliding",
        unsupported="layers with both linear and sliding attention",
        carried_in_files="linear",
    ),
    LayerKind(
        getattr(cache_utils, "DummyLayer", _Missing),  # since transformers 5.20
        reason="reads another layer's keys and values, or none",
        growth=Growth.FIXED,
        form_in_files="empty",
    ),
)
_BY_CLASS = {kind.layer_class: kind for kind in _LISTED}


def kind_of(layer: Any) -> LayerKind:
    """Return the kind of a layer of transformers."""
    return _BY_CLASS.get(type(layer)) or _inherited(type(layer))


def new_layer(
    form: str = _FULL_PRECISION, window: int | None = None, carried: str | None = None, states: int = 1
) -> Any:
    """Return an empty layer.

    Args:
        form: its form in files; by default, that of a layer with keys and values of all tokens in full precision.
        window: its sliding window in tokens, where it has one.
        carried: the form in files of what it has beside keys and values.
        states: how many states of linear attention it has, if it has such.
    """
    wanted = form, carried
    layer_class = next(kind.layer_class for kind in _LISTED if (kind.form_in_files, kind.carried_in_files) == wanted)
    more = {"number_of_states": states} if carried == "linear" else {}
    return layer_class(**more) if window is None else layer_class(sliding_window=window, **more)


def new_carrier(layer: Any) -> Any:
    """Return an empty layer for what a layer of transformers has beside keys and values, or None where it has nothing.

    Args:
        layer: a layer that holds nothing yet.
    """
    carrier = kind_of(layer).carrier
    return None if carrier is None else carrier(number_of_states=getattr(layer, "number_of_states", 1))


def new_beside(carried: str, states: int = 1) -> Any:
    """Return an empty layer for what a quantized layer has beside keys and values.

    Args:
        carried: its form in files.
        states: how many states of linear attention there are, if it is those.
    """
    carrier = next(kind.carrier for kind in _LISTED if kind.carried_in_files == carried and kind.carrier is not None)
    return carrier(number_of_states=states)


def _inherited(layer_class: type) -> LayerKind:
    inherited = [_BY_CLASS[base] for base in layer_class.__mro__ if base in _BY_CLASS]
    states = dict.fromkeys(name for kind in inherited for name in kind.states)
    return LayerKind(
        layer_class,
        reason=f"{layer_class.__name__}, kept by transformers",
        states=tuple(states),
        slides=any(kind.slides for kind in inherited),
    )
