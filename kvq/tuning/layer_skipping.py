"""Running a model from one of its layers on, with the states that full precision had there.

A layer that is quantized changes nothing before it. So what enters it is recorded once, and the layers before it are
left out. The model's own forward runs as always: it makes masks and positions, and then calls layers that return what
they are given. Whether that holds for a model is tried, not assumed; where it does not, every layer runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvq.transformers_seams.key_projections import find_key_projections


def find_layer_modules(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """Return the modules of the decoder's layers, in their order; none if the model names them in another way.

    Args:
        model: a causal model.
        count: layers of its cache.
    """
    found: dict[int, str] = {}
    for name, _ in find_key_projections(model):
        match = re.match(r"(.*?\.(\d+))\.", name)
        if match is not None and found.setdefault(int(match[2]), match[1]) != match[1]:
            return []
    if sorted(found) != list(range(count)):
        return []
    return [model.get_submodule(found[index]) for index in range(count)]


class Recorder:
    """What enters each layer, and the form in which layers return their states.

    Attributes:
        inputs: states before each layer of the latest forward, `[B, T, hidden]`.
        returns_tuple: whether layers return their states as the first of a tuple.
    """

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.returns_tuple = False

    @contextmanager
    def listening(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Record what enters the layers within the block, forward by forward."""
        self.inputs = []
        with ExitStack() as stack:
            for layer in layers:
                before = layer.register_forward_pre_hook(self._note_input, with_kwargs=True)
                after = layer.register_forward_hook(self._note_output)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _note_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(_hidden_states(*args, **kwargs))

    def _note_output(self, _: nn.Module, __: object, output: object) -> None:
        self.returns_tuple = isinstance(output, tuple)


@contextmanager
def skipping(layers: Sequence[nn.Module], start: int, states: torch.Tensor, *, returns_tuple: bool) -> Iterator[None]:
    """Leave out the layers before `start` within the block.

    Args:
        layers: the layers of the decoder.
        start: index of the first one that runs.
        states: what enters it, `[B, T, hidden]`.
        returns_tuple: see `Recorder`.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return (states,) if returns_tuple else states

    with ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(replaced_forward(layer, stand_in))
        yield


@contextmanager
def replaced_forward(layer: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module do something else within the block."""
    own = layer.__dict__.get("forward")  # such as that of accelerate
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _hidden_states(*args: Any, **kwargs: Any) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states
