"""What a layer holds beside keys and values, in a file: states of linear attention, keys of an indexer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from kvq.errors import CacheFileError
from kvq.files.container import SavedTensor, TensorSpec
from kvq.layers.transformers_layers import carrier_of
from kvq.persistence.header import IndexedCarried, LinearCarried, TensorHeader
from kvq.transformers_seams.layer_kinds import kind_of

Read = Callable[[str], torch.Tensor]


class CarriedFormat(Protocol):
    """One kind of such states; `header` is what the file says of them."""

    def describe(self, carrier: Any) -> Any:
        """Return the header of what a layer of transformers carries."""

    def tensors(self, carrier: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield its tensors by name."""

    def plan(self, header: Any) -> Iterator[tuple[str, TensorHeader]]:
        """Yield the tensors that a header promises, by name."""

    def check(self, carrier: Any, header: Any, rows: int | None, tokens: int) -> None:
        """Check that a header fits a new layer, the rows of the batch and the tokens held.

        Raises:
            CacheFileError: it does not.
        """

    def fill(self, carrier: Any, header: Any, read: Read, device: torch.device) -> None:
        """Fill a new layer from the file."""


class _Linear:
    def describe(self, carrier: Any) -> LinearCarried:
        states = dict(self.tensors(carrier))
        indices = range(carrier.number_of_states)
        conv, recurrent = (
            [TensorHeader.of(states[f"{name}.{i}"]) if f"{name}.{i}" in states else None for i in indices]
            for name in ("conv", "recurrent")
        )
        previous = [bool(carrier.has_previous_state[index]) for index in indices]
        sizes = [carrier.conv_kernel_size[index] for index in indices]
        return LinearCarried(conv=conv, recurrent=recurrent, kernel_sizes=sizes, previous=previous)

    def tensors(self, carrier: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(carrier.number_of_states):
            if carrier.is_conv_states_initialized[index]:
                # One that records its past holds more for a while.
                yield f"conv.{index}", carrier.conv_states[index][..., -carrier.conv_kernel_size[index] :]
            if carrier.is_recurrent_states_initialized[index]:
                yield f"recurrent.{index}", carrier.recurrent_states[index]

    def plan(self, header: LinearCarried) -> Iterator[tuple[str, TensorHeader]]:
        for name, described in (("conv", header.conv), ("recurrent", header.recurrent)):
            yield from ((f"{name}.{index}", one) for index, one in enumerate(described) if one is not None)

    def check(self, carrier: Any, header: LinearCarried, rows: int | None, tokens: int) -> None:
        del tokens
        lengths = {len(header.conv), len(header.recurrent), len(header.kernel_sizes), len(header.previous)}
        if lengths != {carrier.number_of_states}:
            raise CacheFileError(f"{sorted(lengths)} states are described, {carrier.number_of_states} are expected")
        for conv, size in zip(header.conv, header.kernel_sizes, strict=True):
            if (conv is None) != (size is None) or (conv is not None and (not conv.shape or conv.shape[-1] != size)):
                raise CacheFileError(f"a state of a convolution is {conv}, and its kernel has a size of {size}")
        _check_rows([one for _, one in self.plan(header)], 0, rows)

    def fill(self, carrier: Any, header: LinearCarried, read: Read, device: torch.device) -> None:
        for index, (conv, recurrent) in enumerate(zip(header.conv, header.recurrent, strict=True)):
            if conv is not None:
                carrier.conv_states[index] = read(f"conv.{index}").to(device)
                carrier.is_conv_states_initialized[index] = True
                carrier.dtype, carrier.device = conv.torch_dtype, device
            if recurrent is not None:
                carrier.recurrent_states[index] = read(f"recurrent.{index}").to(device)
                carrier.is_recurrent_states_initialized[index] = True
            carrier.conv_kernel_size[index] = header.kernel_sizes[index]
            carrier.has_previous_state[index] = header.previous[index]


class _Indexed:
    def describe(self, carrier: Any) -> IndexedCarried:
        described = {name: TensorHeader.of(tensor) for name, tensor in self.tensors(carrier)}
        return IndexedCarried(keys=described.get("keys"), positions=described.get("positions"))

    def tensors(self, carrier: Any) -> Iterator[tuple[str, torch.Tensor]]:
        held = {"keys": carrier.indexer_keys, "positions": getattr(carrier, "indexer_position_ids", None)}
        yield from ((name, tensor) for name, tensor in held.items() if tensor is not None)

    def plan(self, header: IndexedCarried) -> Iterator[tuple[str, TensorHeader]]:
        described = {"keys": header.keys, "positions": header.positions}
        yield from ((name, one) for name, one in described.items() if one is not None)

    def check(self, carrier: Any, header: IndexedCarried, rows: int | None, tokens: int) -> None:
        del carrier
        for name, one in self.plan(header):
            if len(one.shape) != 3 or one.shape[1 if name == "keys" else 2] != tokens:
                raise CacheFileError(f"the {name} of an indexer are {one.shape}, of {tokens} tokens")
            _check_rows([one], 0 if name == "keys" else 1, rows)

    def fill(self, carrier: Any, header: IndexedCarried, read: Read, device: torch.device) -> None:
        if header.keys is not None:
            keys = read("keys").to(device)
            carrier.lazy_initialization_indexer(keys)
            carrier.indexer_keys = keys
        if header.positions is not None:
            carrier.indexer_position_ids = read("positions").to(device)


_FORMATS: dict[str, CarriedFormat] = {"linear": _Linear(), "indexed": _Indexed()}


def find_carried_form(layer: Any) -> str | None:
    """Return the `kind` of the header of what a layer holds beside keys and values, or None where it holds nothing."""
    return kind_of(carrier_of(layer)).carried_in_files


def count_states(header: LinearCarried | IndexedCarried | None) -> int:
    """Return how many states of linear attention a layer has that a header describes; 1 where it has none."""
    return len(header.previous) if isinstance(header, LinearCarried) else 1


def describe_carried(layer: Any) -> Any:
    """Return the header of what a layer holds beside keys and values, or None where it holds nothing."""
    form = find_carried_form(layer)
    return None if form is None else _FORMATS[form].describe(carrier_of(layer))


def collect_carried(layer: Any, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
    """Yield the tensors that a layer holds beside keys and values, by name."""
    form = find_carried_form(layer)
    if form is not None:
        for name, tensor in _FORMATS[form].tensors(carrier_of(layer)):
            yield f"{prefix}.carried.{name}", SavedTensor.of(tensor)


def plan_carried(
    layer: Any, header: Any, prefix: str, rows: int | None, tokens: int
) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors that the file must have beside keys and values, by name.

    Args:
        layer: a new layer.
        header: what the file says of them.
        prefix: begins the names of the layer's tensors.
        rows: of the batch, or None where no layer says.
        tokens: that the cache holds.

    Raises:
        CacheFileError: the header describes no such layer.
    """
    carried = _FORMATS[header.kind]
    try:
        carried.check(carrier_of(layer), header, rows, tokens)
    except CacheFileError as error:
        raise CacheFileError(f"{prefix}: {error}") from error
    for name, one in carried.plan(header):
        yield f"{prefix}.carried.{name}", TensorSpec(tuple(one.shape), one.torch_dtype)


def fill_carried(layer: Any, header: Any, prefix: str, read: Read, device: torch.device) -> None:
    """Fill what a new layer holds beside keys and values from the file."""
    _FORMATS[header.kind].fill(carrier_of(layer), header, lambda name: read(f"{prefix}.carried.{name}"), device)


def _check_rows(described: list[TensorHeader], dim: int, rows: int | None) -> None:
    found = {one.shape[dim] if len(one.shape) > dim else None for one in described}
    if rows is not None and found - {rows}:
        raise CacheFileError(f"states of {found} rows are beside keys and values of {rows}")
