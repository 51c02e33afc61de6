"""The formats that save and load layers, by the form that a layer takes in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from kvq.errors import CacheStateError
from kvq.files.container import SavedTensor, TensorSpec
from kvq.layers.quantized_layer import KVQLayer
from kvq.persistence.carried import describe_carried
from kvq.persistence.header import EmptyHeader, LayerHeader, LinearHeader
from kvq.persistence.plain_layer import DynamicLayerFormat, SlidingLayerFormat
from kvq.persistence.quantized_layer import QuantizedLayerFormat
from kvq.transformers_seams.layer_kinds import kind_of


class LayerFormat(Protocol):
    """Layers of one form in a file: their header, their tensors, and the way back.

    `states` is the part of the header about the states that a layer holds; `prefix` begins the names of its tensors.
    """

    def describe(self, layer: Any) -> LayerHeader:
        """Return the header of a layer."""

    def collect(self, layer: Any, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
        """Yield the tensors of a layer that holds tokens, by name."""

    def prepare(self, layer: Any, states: Any, device: torch.device) -> None:
        """Prepare a new layer for states like those in the file; nothing is read yet."""

    def count_tokens(self, layer: Any, states: Any) -> int:
        """Return the tokens that a prepared layer will have been given."""

    def plan(self, layer: Any, states: Any, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the tensors that the file must have for a prepared layer, by name.

        Raises:
            CacheFileError: the header describes no such layer.
        """

    def fill(self, layer: Any, states: Any, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        """Fill a prepared layer from the file.

        Raises:
            CacheFileError: the tensors make no such layer.
        """


class _EmptyFormat:
    """Layers without keys and values."""

    def __init__(self, header: type[LinearHeader] | type[EmptyHeader]) -> None:
        self._header = header

    def describe(self, layer: Any) -> LayerHeader:
        del layer
        return self._header()

    def collect(self, layer: Any, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
        del layer, prefix
        yield from ()

    def prepare(self, layer: Any, states: Any, device: torch.device) -> None:
        """Do nothing: there are no states."""

    def count_tokens(self, layer: Any, states: Any) -> int:
        del layer, states
        return 0

    def plan(self, layer: Any, states: Any, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
        del layer, states, prefix
        yield from ()

    def fill(self, layer: Any, states: Any, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        """Do nothing, for the same reason."""


QUANTIZED = "quantized"
_FORMATS: Mapping[str, LayerFormat] = {
    QUANTIZED: QuantizedLayerFormat(),
    "dynamic": DynamicLayerFormat(),
    "sliding": SlidingLayerFormat(),
    "linear": _EmptyFormat(LinearHeader),
    "empty": _EmptyFormat(EmptyHeader),
}
"""By the `kind` of a layer's header."""


def find_form(layer: Any) -> str | None:
    """Return the `kind` of the header that a layer gets, or None: no file can hold it."""
    return QUANTIZED if isinstance(layer, KVQLayer) else kind_of(layer).form_in_files


def describe_layer(layer: Any) -> LayerHeader:
    """Return the header of a layer that a file can hold."""
    form = find_form(layer)
    if form is None:
        raise CacheStateError(f"no file can hold a {type(layer).__name__}")
    return _FORMATS[form].describe(layer).model_copy(update={"carried": describe_carried(layer)})


def format_of(header: LayerHeader) -> LayerFormat:
    """Return the format of a layer by its header."""
    return _FORMATS[header.kind]
