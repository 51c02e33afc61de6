"""The processes that share a run: one, or those that `accelerate launch` has started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run.

    Attributes:
        index: index of this process.
        count: number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def find(cls) -> Processes:
        """Return this process's place; it joins the group that `accelerate launch` or `torchrun` has set up."""
        if int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState()
        return cls(state.process_index, state.num_processes)

    @staticmethod
    def is_first() -> bool:
        """Return whether this is the process that prints; it works before torch or accelerate is imported."""
        return (os.environ.get("RANK") or "0") == "0"

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def gather(self, entries: Sequence[T]) -> list[T]:
        """Return the entries of all processes; every process gets all of them."""
        if self.count < 2:
            return list(entries)
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(list(entries))
        return gathered
