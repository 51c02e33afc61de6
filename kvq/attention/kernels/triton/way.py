"""The ways to launch a program that give the same numbers in different times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """One way to launch the program that attends.

    Attributes:
        warps: warps of a program.
        stages: tiles whose loads are under way at once.
        registers: most registers of a thread, or None: as many as the assembler takes.
        programs_per_processor: programs for each multiprocessor, by which the store is split.
    """

    warps: int
    stages: int
    registers: int | None
    programs_per_processor: int

    def options(self) -> dict[str, int]:
        """Return what Triton is told about a launch."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found if self.registers is None else {**found, "maxnreg": self.registers}


@contextmanager
def forced_way(way: Way) -> Iterator[None]:
    """Launch in this way within the block, in this thread, whatever is best; plans that were made before stay."""
    token = _FORCED.set(way)
    try:
        yield
    finally:
        _FORCED.reset(token)


def find_forced_way() -> Way | None:
    """Return the way of the block that this is in, or None."""
    return _FORCED.get()


_FORCED: ContextVar[Way | None] = ContextVar("kvq_triton_way", default=None)
