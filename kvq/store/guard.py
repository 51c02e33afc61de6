"""A wrapper around a backend's own `Quantizer`, which adds to its errors where they happened.

It does what the wrapped one does. It must not know what the parts mean, nor how they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api.packed_format import PackedFormat
from kvq.plugin_api.quantizer import Part, Quantizer, QuantSpec
from kvq.store.declared_format import read_declared
from kvq.store.first_blocks import check_first_blocks, kind_of
from kvq.store.origin import Origin, name_quantizer

_FUSED_METHODS = frozenset({"prepare_query", "scores", "mix", "finish_output"})


class GuardedQuantizer:
    """Satisfies `Quantizer`, and has every other attribute of the backend's own one.

    Args:
        quantizer: the backend's.
        origin: what errors name.
        spec: what it was built from.

    Raises:
        QuantizerContractError: its layout, its constants or its packed format are not what the contract says.

    Attributes:
        packed_format: the format that the backend declares, by which kernels read what it stores; or None.
    """

    rotation_word = "none"
    """What was done to the states first, in the words of `rotation_k`."""

    def __init__(self, quantizer: Quantizer, origin: Origin, spec: QuantSpec) -> None:
        self._inner = quantizer
        self.block_length = quantizer.block_length
        self.group_local = quantizer.group_local
        self._first_block_kind = kind_of(origin.backend, quantizer, spec)
        self.origin = origin
        _check_layout(origin, self.layout())
        # The backend's own, not those that a subclass adds to them.
        _check_constants(origin, GuardedQuantizer.constants(self))
        self.packed_format: PackedFormat | None = read_declared(quantizer, spec, origin)

    @property
    def kind(self) -> type:
        """The class of the backend's quantizer."""
        return type(self._inner)

    def layout(self) -> Mapping[str, Part]:
        """Return the parts of one block of one head."""
        with self.origin.naming("layout"):
            return self._inner.layout()

    def constants(self) -> Mapping[str, torch.Tensor]:
        """Return what `decode_into` needs beyond the parts."""
        with self.origin.naming("constants"):
            return self._inner.constants()

    def encode(self, states: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Quantize whole blocks of `[B, H, T, D]`."""
        with self.origin.naming("encode"):
            return self._inner.encode(states)

    def decode_into(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the states that `parts` stand for into `out` `[B, H, T, D]`."""
        with self.origin.naming("decode_into"):
            self._inner.decode_into(parts, out)

    def look_at_first(self, states: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Check by the first blocks of a process that finite states stay so, and mean the same to kernels."""
        check_first_blocks(self._first_block_kind, name_quantizer(self), self, states, parts)

    def __getattr__(self, name: str) -> Any:
        # What copying and pickling look for would be done to the inner one in the place of this one.
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._inner, name)
        return self._named(name, found) if name in _FUSED_METHODS else found

    def _named(self, operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.origin.naming(operation):
                return method(*args, **kwargs)

        return call


def _check_layout(origin: Origin, layout: object) -> None:
    if not isinstance(layout, Mapping) or not layout:
        raise QuantizerContractError(f"{origin}: layout returned {layout!r}; the contract is a Part for each name")
    for name, part in layout.items():
        if not isinstance(name, str) or not isinstance(part, Part) or not _is_sound(part):
            raise QuantizerContractError(
                f"{origin}: layout has {name!r}: {part!r}; the contract is Part(shape, dtype) with sizes of at least 1"
            )


def _is_sound(part: Part) -> bool:
    sizes = part.shape if isinstance(part.shape, tuple) else (0,)
    return isinstance(part.dtype, torch.dtype) and all(type(size) is int and size > 0 for size in sizes)


def _check_constants(origin: Origin, constants: object) -> None:
    if not isinstance(constants, Mapping) or not all(isinstance(one, torch.Tensor) for one in constants.values()):
        found = type(constants).__name__
        raise QuantizerContractError(
            f"{origin}: constants returned a {found} with something that is not a tensor; the contract is a tensor for "
            "each name, and {} where there are none"
        )
