"""A quantized layer in a file: its header, its tensors, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from kvq.errors import CacheFileError
from kvq.files.container import SavedTensor, TensorSpec
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.sliding_layer import SlidingKVQLayer
from kvq.persistence.header import QuantizedHeader, QuantizedStates, RunHeader, SideHeader, TensorHeader, name_dtypes
from kvq.plugin_api.quantizer import Side
from kvq.store.cropped_groups import CroppedGroups
from kvq.store.saved_blocks import find_runs
from kvq.store.side import LayerSide
from kvq.store.sinks import SinkTokens

ROWS_DTYPE = torch.int64


class QuantizedLayerFormat:
    """Quantized layers; a `LayerFormat`."""

    def describe(self, layer: KVQLayer) -> QuantizedHeader:
        """Return the header of a layer; one that holds no tokens is as good as new."""
        window = layer.window_length if isinstance(layer, SlidingKVQLayer) else None
        if not layer.get_seq_length():
            return QuantizedHeader(sliding_window=window, states=None)
        sides = dict(layer.sides())
        key = sides["key"]
        states = QuantizedStates(
            **name_dtypes(key.dtype, sides["value"].dtype),
            starts=[start + layer.dropped_length for start in key.sinks.starts],
            window=key.window.length,
            dropped=None if window is None else layer.dropped_length,
            key=_describe_side(key),
            value=_describe_side(sides["value"]),
        )
        return QuantizedHeader(sliding_window=window, states=states)

    def collect(self, layer: KVQLayer, prefix: str) -> Iterator[tuple[str, SavedTensor]]:
        """Yield the tensors of a layer that holds tokens, by name."""
        for name, side in layer.sides():
            yield from ((f"{prefix}.{name}.{part}", tensor) for part, tensor in _collect_side(side))

    def prepare(self, layer: KVQLayer, states: QuantizedStates, device: torch.device) -> None:
        """Build the quantizers of a layer for states like those in the file; nothing is read yet."""
        padding, dropped = layer.padding, states.dropped or 0
        empty = [
            torch.empty((len(states.starts), side.heads, 0, side.head_dim), dtype=dtype, device=device)
            for side, dtype in zip((states.key, states.value), states.dtypes, strict=True)
        ]
        # The padding is of the batch that the cache began with; that of the present one is in `starts`.
        layer.padding = None
        layer.lazy_initialization(*empty)
        layer.padding = padding
        for name, side in layer.sides():
            starts = (start for start, _ in _header_of(states, name).survivors)
            side.contents = replace(
                side.contents,
                sinks=SinkTokens(side.sinks.length, tuple(states.starts)).without_first(dropped),
                dropped=dropped,
                cropped=CroppedGroups.at(starts, side.window.view()),
            )

    def count_tokens(self, layer: KVQLayer, states: QuantizedStates) -> int:
        """Return the tokens that a prepared layer will have been given."""
        return (states.dropped or 0) + _count_held(layer, states)

    def plan(self, layer: KVQLayer, states: QuantizedStates, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the tensors that the file must have for a prepared layer, by name.

        Raises:
            CacheFileError: keys and values do not fit together, or the layer never forgets so many tokens.
        """
        held, dropped = _count_held(layer, states), states.dropped or 0
        if dropped % layer.flush_length or (dropped and held < _count_needed(layer)):
            raise CacheFileError(f"{prefix}: {dropped} tokens are forgotten, which the layer does not do")
        for name, side in layer.sides():
            header = _header_of(states, name)
            stored = sum(run.blocks for run in header.runs) * side.store.block_length
            if stored % side.flush_length or stored + states.window != held:
                raise CacheFileError(
                    f"{prefix}: {stored} tokens are stored of the {name}s, which is not a number of flushes"
                )
            if not _are_sinks_whole(side, header, stored):
                raise CacheFileError(f"{prefix}: sinks of the {name}s are there or missing against the configuration")
            _check_cropped(side, header, held)
            planned = {**_plan_store(side, header, len(states.starts)), **_plan_exact(side, states, name)}
            yield from ((f"{prefix}.{name}.{part}", spec) for part, spec in planned.items())

    def fill(self, layer: KVQLayer, states: QuantizedStates, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        """Fill a prepared layer from the file.

        Raises:
            CacheFileError: a batch index leads nowhere, or the backend does not take its constants back.
        """
        for name, side in layer.sides():
            header, place = _header_of(states, name), f"{prefix}.{name}"
            constants = {part: read(f"{place}.constants.{part}") for part in side.codec.constants()}
            side.restore_constants(constants, settled=bool(header.runs))
            for index, run in enumerate(header.runs):
                rows = None if run.rows is None else _checked_rows(read(f"{place}.runs.{index}.rows"), run.rows, place)
                parts = {part: read(f"{place}.runs.{index}.{part}") for part in side.store.writer.layout}
                side.append_encoded(parts, rows)
            exact = {part: read(f"{place}.{part}").to(side.device) for part in _plan_exact(side, states, name)}
            side.contents = side.contents.restored(exact)
            if dict(side.contents.saved()).keys() != exact.keys():
                raise CacheFileError(f"{place}: it holds {sorted(header.others)}, which this release does not know")


def _count_held(layer: KVQLayer, states: QuantizedStates) -> int:
    """Return the tokens that a prepared layer will hold."""
    return states.window + sum(run.blocks for run in states.key.runs) * layer.side("key").store.block_length


def _count_needed(layer: KVQLayer) -> float:
    """Return the fewest tokens that a layer holds which has forgotten some."""
    return layer.window_length - 1 if isinstance(layer, SlidingKVQLayer) else math.inf


def _describe_side(side: LayerSide) -> SideHeader:
    window, sinks = side.window.view(), side.sinks.states
    groups = [(group.start, group.states.shape[2]) for group in side.cropped.groups]
    named = {"window", "sinks", *(f"survivors.{index}" for index in range(len(groups)))}
    return SideHeader(
        heads=window.shape[1],
        head_dim=window.shape[3],
        sinks=sinks is not None,
        sink_tokens=None if sinks is None or sinks.shape[2] == side.sinks.length else sinks.shape[2],
        runs=[
            RunHeader(blocks=run.blocks, rows=None if run.rows is None else run.row_count)
            for run in find_runs(side.store)
        ],
        survivors=groups,
        others={name: TensorHeader.of(tensor) for name, tensor in side.contents.saved() if name not in named},
    )


def _collect_side(side: LayerSide) -> Iterator[tuple[str, SavedTensor]]:
    for name, tensor in side.codec.constants().items():
        yield f"constants.{name}", SavedTensor.of(tensor)
    for index, run in enumerate(find_runs(side.store)):
        if run.rows is not None:
            yield f"runs.{index}.rows", SavedTensor.of(run.rows)
        for name, part in side.store.writer.layout.items():
            spec = TensorSpec((run.row_count, side.store.num_heads, run.blocks, *part.shape), part.dtype)
            yield f"runs.{index}.{name}", SavedTensor(spec, lambda run=run, name=name: run.read(name))  # type: ignore[misc]
    for name, tensor in side.contents.saved():
        yield name, SavedTensor.of(tensor)


def _plan_store(side: LayerSide, header: SideHeader, batch_size: int) -> dict[str, TensorSpec]:
    planned = {
        f"constants.{name}": TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in side.codec.constants().items()
    }
    for index, run in enumerate(header.runs):
        if run.rows is not None:
            planned[f"runs.{index}.rows"] = TensorSpec((batch_size,), ROWS_DTYPE)
        for name, part in side.store.writer.layout.items():
            shape = (batch_size if run.rows is None else run.rows, header.heads, run.blocks, *part.shape)
            planned[f"runs.{index}.{name}"] = TensorSpec(shape, part.dtype)
    return planned


def _plan_exact(side: LayerSide, states: QuantizedStates, name: Side) -> dict[str, TensorSpec]:
    """Return the tensors of the exact pieces that a file must have, by their names within the side."""
    header = _header_of(states, name)
    lengths = {"window": states.window}
    if header.sinks:
        lengths["sinks"] = header.sink_tokens or side.sinks.length
    lengths |= {f"survivors.{index}": length for index, (_, length) in enumerate(header.survivors)}
    outer = len(states.starts), header.heads
    exact = {part: TensorSpec((*outer, length, header.head_dim), side.dtype) for part, length in lengths.items()}
    return exact | {part: TensorSpec(tuple(other.shape), other.torch_dtype) for part, other in header.others.items()}


def _check_cropped(side: LayerSide, header: SideHeader, tokens: int) -> None:
    end = 0
    for start, length in header.survivors:
        if start < end or start % side.flush_length or length >= side.flush_length or start + length > tokens:
            raise CacheFileError(f"{length} tokens at position {start} are not a cropped group")
        end = start + length


def _are_sinks_whole(side: LayerSide, header: SideHeader, stored: int) -> bool:
    """Return whether a file has the sinks of all stored tokens, and no more than there can be."""
    needed = side.sinks.count_among(stored)
    if not header.sinks:
        return not needed and header.sink_tokens is None
    return side.sinks.length > 0 and needed <= (header.sink_tokens or side.sinks.length) <= side.sinks.length


def _header_of(states: QuantizedStates, name: Side) -> SideHeader:
    return states.key if name == "key" else states.value


def _checked_rows(rows: torch.Tensor, count: int, place: str) -> torch.Tensor:
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        raise CacheFileError(f"{place}: the order of the batch names rows outside the {count} that are there")
    return rows
