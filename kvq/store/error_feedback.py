"""Rounding keys for the queries that read them: the error of a channel is made up for in the channels that follow.

A key's error `e` costs `e' M e` in squared scores, where `M` is the second moment of the queries. Rounding each channel
to nearest leaves that sum to chance. Here channels are rounded one after another, those with the largest queries first,
and the error of one is made up for in those not yet rounded, in shares by the Cholesky factor of the inverse of `M`, as
GPTQ (arXiv 2210.17323) does for weights. Only codes differ, so no reader knows of it.

Owns these weights and the loop over channels. It must not know where the moment comes from. The same states give the
same bytes however they are split: every number is made by single operations on elements, never by a sum of many.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvq.plugin_api.packed_format import PackedFormat
from kvq.plugin_api.statistics import LayerStatistics
from kvq.store.packed_decoding import spread_metadata
from kvq.store.rotation import HadamardRotation

DAMPING = 0.01
"""What is added to the diagonal, relative to its mean: a text does not tell all queries that will come."""
PIECE_ELEMENTS = 1 << 20
"""Elements that are rounded at a time: fewer would pay more for each call, more would need more memory."""


Tables = tuple[torch.Tensor, torch.Tensor]
"""The order of channels int64 `[H, D]`, and the weights fp32 `[H, D, D]`; see `find_weights`."""

_SHARED: WeakKeyDictionary[LayerStatistics, dict[Hashable, Tables]] = WeakKeyDictionary()
"""The tables of statistics that are in use, by signs and device: each cache of a model has the same."""


class ErrorFeedback:
    """Chooses codes of keys for given scales and mids.

    Args:
        statistics: of the keys of one layer, with a `query_moment` that is finite; without one no error is made up for.
        rotation: what the keys went through, or None. Its signs are read at the first call.
    """

    def __init__(self, statistics: LayerStatistics, rotation: HadamardRotation | None) -> None:
        self._statistics = statistics
        self._rotation = rotation
        self._tables: dict[torch.device, Tables] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ErrorFeedback:
        return self

    def choose_codes(
        self, packed: PackedFormat, keys: torch.Tensor, scale: torch.Tensor, mid: torch.Tensor
    ) -> torch.Tensor:
        """Return codes for keys that will be read as `scale * (code - 2 ** (bits - 1)) + mid`.

        Args:
            packed: the format of the keys.
            keys: fp32 `[B, H, blocks, D, L]`, rotated and balanced, not clipped; not written to.
            scale: fp32, as the store gives it back: `[B, H, blocks, D]` per channel, `[B, H, blocks, L, groups]` per
                token.
            mid: the same; NaN for a group that is lost, whose error counts as none.

        Returns:
            uint8 `[B, H, blocks, D, L]`.
        """
        order, weights = self.on(keys.device)
        lines = [_by_channel(spread_metadata(packed, numbers), order) for numbers in (scale, mid)]
        rows = _by_channel(keys.detach(), order)
        count = max(1, PIECE_ELEMENTS // max(1, rows[:, :, :1].numel()))
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=keys.device)
        for first in range(0, rows.shape[2], count):
            piece = slice(first, first + count)
            own_scale, own_mid = (line[:, :, piece] for line in lines)
            _round_channels(rows[:, :, piece], own_scale, own_mid, codes[:, :, piece], weights, packed.bits)
        by_row: torch.Tensor = _reorder(codes, order.argsort(-1)).unflatten(2, (keys.shape[0], keys.shape[2]))
        return by_row.permute(2, 0, 3, 1, 4)

    def on(self, device: torch.device) -> Tables:
        """Return the tables on a device, made at the first call; not to be written to."""
        if device not in self._tables:
            self._tables[device] = self._find_shared(device)
        return self._tables[device]

    def _find_shared(self, device: torch.device) -> Tables:
        known = _SHARED.setdefault(self._statistics, {})
        signs = None if self._rotation is None else tuple(self._rotation.signs.tolist())
        if (signs, device) not in known:
            with torch.inference_mode(False), torch.no_grad():
                order, weights = find_weights(rotate_moment(self._find_moment(), self._rotation))
                known[signs, device] = order.to(device).contiguous(), weights.to(device).contiguous()
        return known[signs, device]

    def _find_moment(self) -> torch.Tensor:
        moment = self._statistics.query_moment
        return torch.zeros_like(self._statistics.second_moment) if moment is None else moment


def count_table_bytes(head_dim: int) -> int:
    """Return the bytes of the order and the weights of one head."""
    return head_dim * (torch.int64.itemsize + head_dim * torch.float32.itemsize)


def rotate_moment(moment: torch.Tensor, rotation: HadamardRotation | None) -> torch.Tensor:
    """Return the second moment of rotated queries in float64 on the CPU, `[H, D, D]`, new."""
    moment = moment.double()
    if rotation is None:
        return moment.clone()
    own = HadamardRotation.of_signs(rotation.signs.cpu())
    return own.apply(own.apply(moment).mT.contiguous())


def find_weights(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return in which order channels are rounded, and what of the error of one the later ones make up for.

    Args:
        moment: float64 `[H, D, D]`, symmetric, no eigenvalue below 0 but by rounding.

    Returns:
        The channels by falling diagonal, int64 `[H, D]`; and fp32 `[H, D, D]` by their places in that order: the part
        of the error at place i that place j > i loses.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    rows = order[:, :, None].expand_as(moment)
    sorted_moment = moment.gather(1, rows).gather(2, rows.mT)
    mean = diagonal.mean(-1)
    # Queries that are all zeros ask for nothing: any line is right, and a matrix without an inverse is not.
    damping = torch.where(mean > 0, DAMPING * mean, 1)[:, None, None]
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    inverse = torch.linalg.inv(sorted_moment + damping * identity)
    factor = torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)
    return order, (factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]).float()


def _round_channels(
    rows: torch.Tensor,
    scale: torch.Tensor,
    mid: torch.Tensor,
    codes: torch.Tensor,
    weights: torch.Tensor,
    bits: int,
) -> None:
    """Write the codes of some blocks; overwrites `rows`, all `[H, D, N, L]` with channels in their order."""
    half, count = 2 ** (bits - 1), rows.shape[1]
    divisor = scale.masked_fill(scale == 0, 1)
    for place in range(count):
        steps = (rows[:, place] - mid[:, place]).div_(divisor[:, place]).round_()
        steps = steps.clamp_(-half, half - 1).nan_to_num_(0)
        codes[:, place] = steps + half
        # Of a lost group it is NaN, and past the largest number infinite: neither is an error to make up for.
        error = (rows[:, place] - steps.mul_(scale[:, place]).add_(mid[:, place])).nan_to_num_(0, 0, 0)
        if place + 1 < count:
            shares = weights[:, place, place + 1 :, None, None]
            rows[:, place + 1 :].sub_(shares * error[:, None])


def _by_channel(numbers: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return `[B, H, blocks, D, ...]` as `[H, D, B * blocks, ...]` with channels in an order `[H, D]`, new."""
    return _reorder(numbers.permute(1, 3, 0, 2, 4).flatten(2, 3), order)


def _reorder(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return `[H, D, ...]` with the channels of each head in an order `[H, D]`, new."""
    return rows[torch.arange(len(order), device=order.device)[:, None], order]
