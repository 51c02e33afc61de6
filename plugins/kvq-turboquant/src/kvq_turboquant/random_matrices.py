"""The random matrices that all vectors of one length share: made once, never written to."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def random_rotation(dimension: int, seed: int, device: str) -> torch.Tensor:
    """Return a random orthogonal matrix fp32 `[n, n]`, uniform over all of them.

    The factor Q of a normal matrix is, once the signs of R's diagonal are taken into it (Mezzadri, math-ph/0609050).
    """
    with torch.inference_mode(mode=False):  # loading a cache may write into it
        factor, upper = torch.linalg.qr(_normal_matrix(dimension, seed))
        return (factor * upper.diagonal().sign()).float().to(device)


@lru_cache(maxsize=64)
def random_projection(dimension: int, seed: int, device: str) -> torch.Tensor:
    """Return a matrix fp32 `[n, n]` of independent standard normal numbers."""
    with torch.inference_mode(mode=False):
        return _normal_matrix(dimension, seed + 1_000_003).float().to(device)


def _normal_matrix(dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + dimension)
    return torch.randn(dimension, dimension, generator=generator, dtype=torch.float64, device="cpu")
