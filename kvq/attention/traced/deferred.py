"""What `KVQ.update` returns while torch.compile traces a model: states that are not added to the cache yet.

The "kvq" attention adds them and attends in one operation, see `step.py`. Whatever else a model does with them adds
them at once, outside of the graph, and goes on with what the cache then returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from kvq.attention.traced.ticket import StatesTaker, Ticket
from kvq.errors import CacheStateError

_OPERATORS = (
    "getitem",
    "neg",
    *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "matmul") for side in ("", "r")),
)


class DeferredPair:
    """Keys and values that one layer of a cache is going to take.

    Args:
        taker: the cache.
        ticket: stands for it in the graph.
        key: `[B, H, T, D_k]`.
        value: `[B, H, T, D_v]`.
        layer_idx: index of the layer.

    Attributes:
        is_taken: whether the cache has them.
    """

    def __init__(
        self, taker: StatesTaker, ticket: Ticket, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> None:
        self.taker, self.ticket, self.layer_idx = taker, ticket, layer_idx
        self.key, self.value = key, value
        self.is_taken = False
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None

    def states(self) -> tuple[Any, Any]:
        """Return what stands for keys and values."""
        return DeferredStates(self, 0), DeferredStates(self, 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def settle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the cache returns for these states; add them, unless that was done here before.

        Raises:
            CacheStateError: attention has read them already. Only layers that share states do that.
        """
        if self._given is None:
            if self.is_taken:
                raise CacheStateError(
                    f"layer {self.layer_idx}: keys and values of KVQ.update were used again after attention had read "
                    "them, which a compiled model cannot do; run this model without torch.compile"
                )
            self.is_taken = True
            self._given = self.taker.take(self.key, self.value, self.layer_idx)
        return self._given


class DeferredStates:
    """The keys or the values of a `DeferredPair`; as a tensor, what the cache returns for them."""

    def __init__(self, pair: DeferredPair, place: int) -> None:
        self.pair = pair
        self._place = place

    def settle(self) -> torch.Tensor:
        """Return the states as `KVQ.update` returns them outside of graphs."""
        states: torch.Tensor = self.pair.settle()[self._place]
        return states

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.settle(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch on what the cache returns."""
        del types
        return func(*tree_map(settled, args), **tree_map(settled, dict(kwargs or {})))


def find_pair(key: object, value: object) -> DeferredPair | None:
    """Return the pair whose keys and values these are, or None."""
    if isinstance(key, DeferredStates) and isinstance(value, DeferredStates) and key.pair is value.pair:
        return key.pair
    return None


def settled(value: Any) -> Any:
    """Return what the cache returns in place of deferred states, and anything else as it is."""
    return value.settle() if isinstance(value, DeferredStates) else value


def _on_settled(name: str) -> Callable[..., Any]:
    def run(self: DeferredStates, *args: Any) -> Any:
        return getattr(self.settle(), name)(*tree_map(settled, args))

    return run


for _name in _OPERATORS:
    setattr(DeferredStates, f"__{_name}__", _on_settled(f"__{_name}__"))
