"""Layers on other devices: moved for good, or read ahead from where they are offloaded to.

It knows layers, and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from kvq.errors import ConfigError, Fault
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import moved_layer


def move_layers(layers: Sequence[Any], device: str | torch.device) -> list[Any]:
    """Return the layers with their states on a device; those given stay as they are.

    Raises:
        ConfigError: the device cannot be used.
        KVQError: a backend cannot work there.
    """
    wanted = usable_device(device)
    return [layer.moved_to(wanted) if isinstance(layer, KVQLayer) else moved_layer(layer, wanted) for layer in layers]


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device that holds data, with its index.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError([Fault(("device",), f"{str(device)!r} cannot be used here: {error}")]) from error
    if found.type == "meta":
        raise ConfigError([Fault(("device",), "'meta' holds no data; choose a device such as 'cpu' or 'cuda:0'")])
    return found


@contextmanager
def reading_ahead(layers: Sequence[Any], layer_idx: int) -> Iterator[None]:
    """Read an offloaded layer within the block, then start copying the next layer (wrapping around).

    The copies of a layer are dropped with the block: the states returned to the attention keep them as long as needed,
    and a kernel drops its data about them when the next layer is read. On a GPU they travel on a stream of their own
    while the model computes.
    """
    layer = layers[layer_idx]
    device = layer.device
    for other in layers:
        if isinstance(other, KVQLayer) and other is not layer:
            other.kernel_cache.forget_kernel_data()
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
    try:
        yield
    finally:
        layer.release_prefetched()
    following = [*layers[layer_idx + 1 :], *layers[:layer_idx]]
    coming = next((one for one in following if isinstance(one, KVQLayer) and one.is_offloaded), None)
    if coming is not None:
        with _on_side_stream(coming.device):
            coming.prefetch()


def _on_side_stream(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    # Memory of an earlier copy, which the model may still read, is used again on that stream: it waits for the model.
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
