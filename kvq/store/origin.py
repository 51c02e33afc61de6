"""Where a quantizer comes from, and how errors name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvq.errors import BackendFailedError, KVQError
from kvq.plugin_api.quantizer import QuantSpec, Side


@dataclass(frozen=True)
class Origin:
    """Where a quantizer comes from and what it is for.

    Attributes:
        backend: name of the backend.
        layer_idx: index of the layer.
        side: keys or values.
    """

    backend: str
    layer_idx: int
    side: Side

    @classmethod
    def of(cls, backend: str, spec: QuantSpec) -> Origin:
        """Return the origin of what a backend builds from `spec`."""
        return cls(backend, spec.layer_idx, spec.side)

    def __str__(self) -> str:
        return f"backend {self.backend!r}, layer {self.layer_idx}, {self.side}s"

    @contextmanager
    def naming(self, operation: str) -> Iterator[None]:
        """Turn an error of foreign code into one that says where it happened.

        Errors of kvq go through, and so does memory that ran out: it is nobody's fault, and callers look for it.

        Raises:
            BackendFailedError: the block raised; from its own error.
        """
        try:
            yield
        except (KVQError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise BackendFailedError(
                f"{self}: {operation} failed: {type(error).__name__}: {error}; tell those who maintain that backend, "
                "or choose another one"
            ) from error


def name_quantizer(quantizer: object) -> str:
    """Return how errors call a quantizer: its class, after its origin where that is known."""
    origin, kind = getattr(quantizer, "origin", None), getattr(quantizer, "kind", type(quantizer))
    return f"{origin}: {kind.__name__}" if isinstance(origin, Origin) else str(kind.__name__)
