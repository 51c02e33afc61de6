"""Tensors that stand for a cache inside a graph, which holds tensors and numbers alone.

The operation that adds states to a cache declares that it writes to the cache's ticket: so torch.compile keeps the
operations of one cache in order, and drops none. A graph takes the ticket as an input, so the graph of one cache serves
every other.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch


class StatesTaker(Protocol):
    """A cache, as far as a graph needs one."""

    def take(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of one layer and return all its keys and values, as `KVQ.update` does outside of graphs."""
        ...


class Ticket:
    """The ticket of at most one cache. A copy is nobody's: a copied cache is another one.

    Attributes:
        number: int64 `[1]`, on the processor; 0 until it is issued.
        is_issued: whether it stands for a cache.
    """

    def __init__(self) -> None:
        # A tensor made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.number = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.is_issued = False

    @classmethod
    def of(cls, taker: StatesTaker) -> Ticket:
        """Return the ticket of a cache, which it does not keep alive."""
        ticket = cls()
        number = next(_NUMBERS)
        _TAKERS[number] = taker
        ticket.number.fill_(number)
        ticket.is_issued = True
        return ticket

    def __reduce__(self) -> tuple[type[Ticket], tuple[()]]:
        return Ticket, ()


def find_taker(number: torch.Tensor) -> StatesTaker:
    """Return the cache that a ticket's number stands for."""
    return _TAKERS[int(number.item())]


_NUMBERS = itertools.count(1)
_TAKERS: WeakValueDictionary[int, StatesTaker] = WeakValueDictionary()
