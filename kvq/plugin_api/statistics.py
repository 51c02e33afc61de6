"""What a backend may be told of a model: statistics of a layer's states, collected once on a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What the states of one side of one layer were like on a text.

    All tensors are float32 on the CPU, and nobody may write to them. The states are those that the cache is given: keys
    after the rotation of positions. Tokens that stay exact at the beginning of a text are left out.

    Attributes:
        second_moment: `[H, D, D]`, the mean of `x x^T` over tokens; less `mean mean^T` it is the covariance.
        mean: `[H, D]`, the mean of the states.
        minimum: `[H, D]`, the smallest number of each channel.
        maximum: `[H, D]`, the largest number of each channel.
        query_moment: `[H, D, D]`, for keys: the mean of `q q^T` over tokens and over the query heads that read a
            key-value head, as attention gets them and not scaled; an error `e` of a key costs `e^T query_moment e` in
            squared scores. None for values, and where the queries have another shape than the keys (latent attention).
    """

    second_moment: torch.Tensor
    mean: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor
    query_moment: torch.Tensor | None = None

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance of the states, `[H, D, D]`, a new tensor."""
        return self.second_moment - self.mean[:, :, None] * self.mean[:, None, :]

    @classmethod
    def of_standard_states(cls, num_heads: int, head_dim: int, *, queries: bool) -> LayerStatistics:
        """Return those of standard normal states and, on request, queries: no channel is unlike the others.

        Args:
            num_heads: key-value heads (H).
            head_dim: elements of one head (D).
            queries: whether there is a `query_moment`.
        """
        moment = torch.eye(head_dim).repeat(num_heads, 1, 1)
        mean = torch.zeros(num_heads, head_dim)
        return cls(moment, mean, mean - 4, mean + 4, moment.clone() if queries else None)
