"""The header of a file: the configuration, the fingerprints, and the shape of each layer's states.

Owns the words of the format. Everything is bounded here, so code that reads a checked header may rely on it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kvq.files.model_fingerprint import ModelFingerprint

FORMAT_NAME = "kvq.cache"
FORMAT_VERSION = 1
EXTENDED_VERSION = 2
"""Format of a file that says more: values of another dtype than the keys, or only the first ones of the sinks."""
OTHERS_VERSION = 3
"""Format of a file with a piece of a side that the other formats have no word for."""
CARRIED_VERSION = 4
"""Format of a file with states of linear attention, keys of indexers, layers without states or a cross-attention."""
SLIDING_VERSION = 5
"""Format of a file with quantized layers that forget what is behind their window."""
READABLE_VERSIONS = (FORMAT_VERSION, EXTENDED_VERSION, OTHERS_VERSION, CARRIED_VERSION, SLIDING_VERSION)
MAX_CARRIED = 64
"""Most states of one layer of linear attention that are believed: models have up to three."""
MAX_HEAD_DIM = 1 << 11
"""Widest head that is believed: models have up to 576, and a quantizer may build matrices of D * D."""
MAX_TOKENS = 1 << 40

Heads = Annotated[int, Field(ge=1, le=1 << 13)]
HeadDim = Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
StatesDtype = Literal["float16", "bfloat16", "float32"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunHeader(_Strict):
    """Blocks of a store that share one batch order."""

    blocks: Count
    rows: Count | None = Field(description="rows that the run holds where an index maps the batch to them; else null")


class TensorHeader(_Strict):
    """A tensor that no other field describes."""

    dtype: Literal["float16", "bfloat16", "float32", "uint8", "int8", "int32", "int64", "bool"]
    shape: list[Tokens] = Field(max_length=8)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorHeader:
        """Describe a tensor."""
        return cls.model_validate({"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class SideHeader(_Strict):
    """Keys or values of a quantized layer."""

    heads: Heads
    head_dim: HeadDim
    sinks: bool
    sink_tokens: Count | None = Field(default=None, description="sinks in the file; left out where all of them are")
    runs: list[RunHeader]
    survivors: list[tuple[Tokens, Count]] = Field(description="first position and tokens of each cropped group")
    others: dict[str, TensorHeader] = Field(default={}, description="what else the side holds; left out where nothing")

    @model_serializer(mode="wrap")
    def _leave_out_what_is_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.sink_tokens is None:
            del content["sink_tokens"]
        if not self.others:
            del content["others"]
        return content


class StatesDtypes(_Strict):
    """The dtypes of a layer's states; under autocast the two sides differ."""

    dtype: StatesDtype = Field(description="of the keys")
    value_dtype: StatesDtype | None = Field(default=None, description="of the values; left out where it is the same")

    @model_serializer(mode="wrap")
    def _leave_out_what_is_the_same(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.value_dtype is None:
            del content["value_dtype"]
        return content

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of keys and values."""
        return getattr(torch, self.dtype), getattr(torch, self.value_dtype or self.dtype)


def name_dtypes(keys: torch.dtype, values: torch.dtype) -> dict[str, Any]:
    """Return the fields of `StatesDtypes` for keys and values of these dtypes."""
    names = [str(one).removeprefix("torch.") for one in (keys, values)]
    return {"dtype": names[0], "value_dtype": None if names[0] == names[1] else names[1]}


class QuantizedStates(StatesDtypes):
    """The states of a quantized layer."""

    starts: list[Tokens] = Field(min_length=1, description="position of the first real token of each row")
    window: Tokens
    dropped: Tokens | None = Field(
        default=None, description="first tokens that are forgotten; left out where the layer forgets none"
    )
    key: SideHeader
    value: SideHeader

    @model_serializer(mode="wrap")
    def _leave_out_what_is_the_same(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        return {name: one for name, one in content.items() if name not in ("value_dtype", "dropped") or one is not None}


class PlainStates(StatesDtypes):
    """The states of a layer of transformers."""

    batch_size: Count
    tokens: Tokens = Field(description="tokens that the tensors hold")
    seen: Count = Field(description="tokens that the layer was given; those of a sliding layer may be gone")
    key: tuple[Heads, HeadDim]
    value: tuple[Heads, HeadDim]


class LinearCarried(_Strict):
    """States of linear attention and convolutions, by their index."""

    kind: Literal["linear"] = "linear"
    conv: list[TensorHeader | None] = Field(max_length=MAX_CARRIED)
    recurrent: list[TensorHeader | None] = Field(max_length=MAX_CARRIED)
    kernel_sizes: list[Count | None] = Field(max_length=MAX_CARRIED)
    previous: list[bool] = Field(max_length=MAX_CARRIED, description="whether a token was seen")


class IndexedCarried(_Strict):
    """The keys of an indexer, and the positions that a model may keep with them."""

    kind: Literal["indexed"] = "indexed"
    keys: TensorHeader | None
    positions: TensorHeader | None


Carried = Annotated[LinearCarried | IndexedCarried, Field(discriminator="kind")]


class _Carrying(_Strict):
    carried: Carried | None = Field(default=None, description="what it holds beside keys and values, if it can")

    @model_serializer(mode="wrap")
    def _leave_out_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.carried is None:
            del content["carried"]
        return content


class QuantizedHeader(_Carrying):
    """A `KVQLayer`; `states` is null where it holds nothing."""

    kind: Literal["quantized"] = "quantized"
    sliding_window: Count | None = Field(
        default=None, description="tokens that a query sees, if what is behind is forgotten; left out where it is not"
    )
    states: QuantizedStates | None

    @model_validator(mode="after")
    def _check_that_dropped_is_said(self) -> QuantizedHeader:
        if self.sliding_window is not None and self.states is not None and self.states.dropped is None:
            raise ValueError("it does not say how many tokens of a layer that slides are forgotten")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        return {name: one for name, one in content.items() if name not in ("carried", "sliding_window") or one}


class DynamicHeader(_Carrying):
    """A `DynamicLayer` of transformers, or a layer with more in it."""

    kind: Literal["dynamic"] = "dynamic"
    states: PlainStates | None


class SlidingHeader(_Carrying):
    """A `DynamicSlidingWindowLayer` of transformers, or a layer with more in it."""

    kind: Literal["sliding"] = "sliding"
    sliding_window: Count
    states: PlainStates | None


class LinearHeader(_Carrying):
    """A `LinearAttentionLayer` of transformers."""

    kind: Literal["linear"] = "linear"
    states: None = None


class EmptyHeader(_Carrying):
    """A `DummyLayer` of transformers."""

    kind: Literal["empty"] = "empty"
    states: None = None


LayerHeader = QuantizedHeader | DynamicHeader | SlidingHeader | LinearHeader | EmptyHeader
LayerHeaders = list[Annotated[LayerHeader, Field(discriminator="kind")]]


class BackendFingerprint(_Strict):
    """Where a backend came from, and the versions of the distributions that it requires."""

    origin: str
    requires: dict[str, str | None]


class CacheHeader(_Strict):
    """All that a file says beside the numbers themselves."""

    kvq_version: str
    config: dict[str, Any]
    states_device: str = Field(description="type of the device that the states were on")
    padding: list[Tokens] | None
    token_ids: tuple[Count, Count] | None
    model: ModelFingerprint | None
    backends: dict[str, BackendFingerprint]
    layers: LayerHeaders
    position_offsets: TensorHeader | None = Field(
        default=None, description="what the model keeps of images, if it does"
    )
    cross_layers: LayerHeaders | None = Field(default=None, description="of the cross-attention, where there is one")

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in ("position_offsets", "cross_layers"):
            if content[name] is None:
                del content[name]
        return content

    @property
    def format_version(self) -> int:
        """The version of the format that can say all this; readers of older ones take what they know."""
        if any(isinstance(layer, QuantizedHeader) and layer.sliding_window for layer in self.layers):
            return SLIDING_VERSION
        if (self.cross_layers, self.position_offsets) != (None, None) or any(
            layer.carried is not None or isinstance(layer, EmptyHeader) for layer in self.layers
        ):
            return CARRIED_VERSION
        held = [layer.states for layer in self.layers if layer.states is not None]
        sides = [side for one in held if isinstance(one, QuantizedStates) for side in (one.key, one.value)]
        if any(side.others for side in sides):
            return OTHERS_VERSION
        extended = any(one.value_dtype is not None for one in held) or any(side.sink_tokens for side in sides)
        return EXTENDED_VERSION if extended else FORMAT_VERSION
