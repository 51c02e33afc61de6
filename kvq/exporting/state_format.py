"""How an engine stores states: a name, its bits, and what comes back of states that were stored so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvq.plugin_api.hadamard import hadamard_block, hadamard_transform


class StateFormat(ABC):
    """One way to store the states of a token; it has no memory of other tokens, but for what `calibrated` says.

    Attributes:
        name: the engine's own name of it.
        groups: in words, the elements that share a scale.
    """

    name: str
    groups: str

    @abstractmethod
    def bits(self, head_dim: int) -> float:
        """Return the stored bits of an element, scales included, of heads of `head_dim` elements."""

    @abstractmethod
    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states that are read where these were written.

        Args:
            states: fp32 `[B, H, T, D]`; not written to.

        Returns:
            fp32 of the same shape.
        """

    def fits(self, head_dim: int) -> bool:
        """Return whether heads of `head_dim` elements can be stored so."""
        del head_dim
        return True

    def calibrated(self, states: torch.Tensor) -> StateFormat:
        """Return the format with the constants that a calibration on these states finds; itself where it has none."""
        del states
        return self


@dataclass(frozen=True)
class FullPrecision(StateFormat):
    """The states as the model computes them."""

    name: str = "f16"
    groups: str = "none"

    def bits(self, head_dim: int) -> float:
        """Return 16."""
        del head_dim
        return 16.0

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states."""
        return states


@dataclass(frozen=True)
class PerToken(StateFormat):
    """Codes of each token and head under scales of their own, of 32 bits in all.

    Attributes:
        code_bits: bits of a code.
    """

    name: str
    groups: str = "one head of one token"
    code_bits: ClassVar[int] = 8

    def bits(self, head_dim: int) -> float:
        """Return the codes and their scales."""
        return self.code_bits + 32 / head_dim


@dataclass(frozen=True)
class Rotated(StateFormat):
    """Another format behind a Hadamard transform of each head, which is undone on reading.

    Attributes:
        inner: the other format.
        block: elements that are transformed together; 0: the largest power of two that divides a head.
        least: heads that no such power divides stay as they are.
        seed: where it is not None, signs are drawn with it and multiplied on first.
    """

    inner: StateFormat
    block: int = 0
    least: int = 64
    seed: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]  # the other format's
        """The name of the other format."""
        return self.inner.name

    @property
    def groups(self) -> str:  # type: ignore[override]  # the other format's
        """The groups of the other format."""
        return self.inner.groups

    def bits(self, head_dim: int) -> float:
        """Return those of the other format."""
        return self.inner.bits(head_dim)

    def fits(self, head_dim: int) -> bool:
        """Return whether the other format can store such heads."""
        return self.inner.fits(head_dim)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read, rotated back."""
        head_dim = states.shape[-1]
        if head_dim % self.least:
            return self.inner.rounded(states)
        block, signs = self.block or hadamard_block(head_dim), self._signs(states)
        rotated = hadamard_transform((states * signs).unflatten(-1, (-1, block))).flatten(-2)
        read = self.inner.rounded(rotated)
        return hadamard_transform(read.unflatten(-1, (-1, block))).flatten(-2) * signs

    def _signs(self, states: torch.Tensor) -> torch.Tensor:
        if self.seed is None:
            return torch.ones((), device=states.device)
        drawn = torch.randint(0, 2, states.shape[-1:], generator=torch.Generator().manual_seed(self.seed))
        return (2.0 * drawn - 1).to(states.device)
