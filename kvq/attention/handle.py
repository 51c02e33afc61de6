"""Tensors without storage that stand for the keys and values of a layer during one forward.

Models pass the tensors that `update` returns to their attention function untouched. The "kvq" attention recognizes such
a handle and reads the layer's view through it; any other operation of torch sees fresh full-precision states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map

from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.errors import CacheStateError
from kvq.store.side import SideView


@dataclass(frozen=True)
class PackedPair:
    """Keys and values of one layer at one forward.

    Attributes:
        key: view of the keys.
        value: view of the values.
        kernel_cache: the layer's; its version tells whether the layer has changed since.
        outlives: whether the states may be read after the layer has changed, as a drafter does that shares them.
        hidden: first tokens of the views that are held and no query sees; handles and masks begin behind them.
    """

    key: SideView
    value: SideView
    kernel_cache: KernelCache
    outlives: bool = False
    hidden: int = 0

    def handles(self) -> tuple[PackedStates, PackedStates]:
        """Return the two tensors that stand for the pair until the layer changes."""
        version = self.kernel_cache.version
        return PackedStates.of(self, self.key, version), PackedStates.of(self, self.value, version)


class PackedStates(torch.Tensor):
    """Keys or values of a layer as a tensor without storage; see the module."""

    pair: PackedPair
    _side: SideView
    _stamp: int

    @staticmethod
    def of(pair: PackedPair, side: SideView, version: int) -> PackedStates:
        """Return a handle with the shape, dtype and device of the states that `side` stands for."""
        like = side.like
        batch, heads, _, head_dim = like.shape
        shape = (batch, heads, side.length - pair.hidden, head_dim)
        # Not by `PackedStates(...)`: calling the class of a tensor takes longer than making the tensor.
        made: Any = torch.Tensor._make_wrapper_subclass(PackedStates, shape, dtype=like.dtype, device=like.device)
        handle: PackedStates = made
        handle.pair, handle._side, handle._stamp = pair, side, version
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch declares Any
        del tensor_contents
        return f"PackedStates(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def is_fresh(self) -> bool:
        """Whether the layer has not changed since."""
        return self.pair.kernel_cache.version == self._stamp

    def check_fresh(self) -> None:
        """Check that the layer has not changed since, unless the states may outlive that.

        Raises:
            CacheStateError: it has; nobody who knows the cache asks for these states.
        """
        if not self.is_fresh and not self.pair.outlives:
            raise CacheStateError(
                "keys or values returned by KVQ.update were used after the cache changed; "
                "use them within the forward that they were made for, or take cache.materialize(layer_idx)"
            )

    def materialize(self) -> torch.Tensor:
        """Return the states as a plain tensor `[B, H, T, D]`."""
        self.check_fresh()
        states = self._side.materialize()
        hidden = self.pair.hidden
        if states is self._side.new:
            return states.clone()
        return states[:, :, hidden:] if hidden else states

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without cls
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any operation on fresh states in place of the handles.

        Raises:
            CacheStateError: the operation would write to a handle, which the cache would never see.
        """
        del types
        for place, argument in enumerate(func._schema.arguments):  # type: ignore[attr-defined]
            value = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            if isinstance(value, PackedStates) and argument.alias_info is not None and argument.alias_info.is_write:
                raise CacheStateError(f"{func} writes to keys or values of KVQ; take cache.materialize(layer_idx)")

        def plain(value: Any) -> Any:
            return value.materialize() if isinstance(value, PackedStates) else value

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs or {})))

    def __setitem__(self, index: object, value: object) -> NoReturn:
        """Refuse: a write would reach a copy only."""
        raise CacheStateError("keys and values of KVQ cannot be written to; take cache.materialize(layer_idx)")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return a plain copy of the states."""
        copied = self.materialize().clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain states."""
        return torch.Tensor.__reduce_ex__(self.materialize(), protocol)  # type: ignore[no-untyped-call]

    def data_ptr(self) -> NoReturn:
        """Refuse: there is no storage to point to."""
        raise CacheStateError("a handle of KVQ has no storage; take cache.materialize(layer_idx)")

    def share_memory_(self) -> NoReturn:
        """Refuse, for the same reason."""
        raise CacheStateError("a handle of KVQ has no storage to share; take cache.materialize(layer_idx)")
