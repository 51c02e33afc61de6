"""The best scalar codebook for a coordinate of a random direction: Lloyd-Max, computed numerically.

A coordinate of a vector that is uniform on the unit sphere of R^n is the cosine of an angle whose density goes with
`sin(angle) ** (n - 2)` (lemma 1 of arXiv 2504.19874, a shifted Beta distribution). Codebooks here are for vectors of
length `sqrt(n)`: their coordinates have variance 1 and are normal for large n.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

GRID_SIZE = 1 << 16
LLOYD_STEPS = 30
NEWTON_STEPS = 12
CONVERGED = 1e-11


class CoordinateDistribution:
    """The distribution of a coordinate of a random vector of length `sqrt(n)` in R^n, by its integrals.

    Args:
        dimension: n, at least 2.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        edges = torch.linspace(math.pi, 0, GRID_SIZE + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2
        weights = (torch.sin(middles).log() * (dimension - 2)).exp()
        weights = weights / weights.sum()
        values = torch.cos(middles) * math.sqrt(dimension)
        zero = torch.zeros(1, dtype=torch.float64)
        self._mass = torch.cat([zero, weights.cumsum(0)])
        self._moment = torch.cat([zero, (weights * values).cumsum(0)])
        self._norm = float(weights.max()) / (math.pi / GRID_SIZE)

    def integrals(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probability and first moment below each position, fp64."""
        cosines = (positions / math.sqrt(self.dimension)).clamp(-1, 1)
        places = (math.pi - torch.acos(cosines)) / math.pi * GRID_SIZE
        left = places.floor().clamp(0, GRID_SIZE - 1).long()
        share = places - left
        return tuple(torch.lerp(table[left], table[left + 1], share) for table in (self._mass, self._moment))  # type: ignore[return-value]

    def density(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the density at each position, fp64."""
        cosines = (positions / math.sqrt(self.dimension)).clamp(-1, 1)
        sines = (1 - cosines.square()).clamp_min(1e-300).sqrt()
        return self._norm * sines ** (self.dimension - 3) / math.sqrt(self.dimension)


@lru_cache(maxsize=64)
def find_levels(dimension: int, nbits: int) -> tuple[float, ...]:
    """Return the `2 ** nbits` levels with the least mean squared error, ascending.

    Args:
        dimension: elements of the vector, n.
        nbits: bits per coordinate, 1 to 8.
    """
    distribution = CoordinateDistribution(dimension)
    count = 2**nbits
    # From levels at the quantiles of the distribution, towards which Lloyd's steps move the far ones quickly.
    spread = torch.linspace(-1, 1, 2 * count + 1, dtype=torch.float64)[1::2]
    levels = spread * min(math.sqrt(dimension), 0.9 + 0.55 * nbits)
    for _ in range(LLOYD_STEPS):
        levels = _centroids(distribution, levels)[0]
    for _ in range(NEWTON_STEPS):
        change = _newton_step(distribution, levels)
        levels = levels + change
        if float(change.abs().max()) < CONVERGED:
            break
    return tuple(((levels - levels.flip(0)) / 2).tolist())


def measure_distortion(dimension: int, levels: tuple[float, ...]) -> float:
    """Return the mean squared error of a codebook per coordinate, the variance being 1."""
    centroids, masses, _ = _centroids(CoordinateDistribution(dimension), torch.tensor(levels, dtype=torch.float64))
    points = torch.tensor(levels, dtype=torch.float64)
    return float(1 - (masses * (2 * points * centroids - points.square())).sum())


def _centroids(
    distribution: CoordinateDistribution, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and probability of the cell of each level, and the boundaries between the cells."""
    inner = (levels[1:] + levels[:-1]) / 2
    edge = torch.tensor([math.sqrt(distribution.dimension)], dtype=torch.float64)
    mass, moment = distribution.integrals(torch.cat([-edge, inner, edge]))
    masses = mass.diff().clamp_min(1e-300)
    return moment.diff() / masses, masses, inner


def _newton_step(distribution: CoordinateDistribution, levels: torch.Tensor) -> torch.Tensor:
    """Return the step towards levels that are the means of their own cells; Lloyd's iteration takes thousands."""
    means, masses, inner = _centroids(distribution, levels)
    density = distribution.density(inner) / 2
    left = density * (inner - means[:-1]) / masses[:-1]  # how the mean of a cell moves with its upper boundary
    right = density * (means[1:] - inner) / masses[1:]  # and with its lower one
    slopes = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    index = torch.arange(len(inner))
    for row, gain in ((index, left), (index + 1, right)):
        slopes[row, index] += gain
        slopes[row, index + 1] += gain
    return torch.linalg.solve(torch.eye(len(levels), dtype=torch.float64) - slopes, means - levels)
