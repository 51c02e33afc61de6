"""How far a long piece of work is, for whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Is told how far the work is."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a part of the work.

        Args:
            label: names the first task.
            total: units of work in this part.
            unit: the units' name, in the plural.
        """

    def advance(self, label: str, done: int = 1) -> None:
        """Note that units are done, and name the next task."""


class Nobody:
    """Satisfies `Watcher`, and does nothing."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, label: str, done: int = 1) -> None:
        """Do nothing."""
