"""Stored keys and values in pieces of the same tokens, however the chunks of the two sides are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kvq.attention.handle import PackedPair
from kvq.store.chunks import StoreView

PIECE_ELEMENTS = 1 << 20
"""Elements of the states that one piece stands for, at most, where that is a flush length or more."""

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StoredPiece:
    """Neighbouring tokens of a store.

    Attributes:
        start: position of the first.
        stop: position behind the last.
        keys: runs of blocks that together hold the keys, each with its number of tokens.
        values: the same for the values.
    """

    start: int
    stop: int
    keys: tuple[tuple[Parts, int], ...]
    values: tuple[tuple[Parts, int], ...]


def iterate_pieces(pair: PackedPair, rows: int, device: torch.device) -> Iterator[StoredPiece]:
    """Yield the stored tokens, piece by piece, on `device`; `rows` query vectors read each key-value head."""
    stored = pair.key.store.length
    length = piece_length(pair, rows)
    for start in range(0, stored, length):
        stop = min(stored, start + length)
        keys = tuple(read_tokens(pair.key.store, start, stop, device))
        yield StoredPiece(start, stop, keys, tuple(read_tokens(pair.value.store, start, stop, device)))


def piece_length(pair: PackedPair, rows: int = 0) -> int:
    """Return the tokens of a piece: whole blocks of both sides, so few that states and scores stay small."""
    step = math.lcm(pair.key.store.codec.block_length, pair.value.store.codec.block_length)
    batch, heads, _, head_dim = pair.key.like.shape
    per_token = batch * heads * max(head_dim, pair.value.like.shape[3], rows)
    return max(1, PIECE_ELEMENTS // (per_token * step)) * step


def read_tokens(store: StoreView, start: int, stop: int, device: torch.device) -> Iterator[tuple[Parts, int]]:
    """Yield the blocks of the tokens from `start` to `stop`, whole blocks, chunk by chunk, in batch order."""
    block_length = store.codec.block_length
    first, last, offset = start // block_length, stop // block_length, 0
    for segment in store.segments:
        begin, end = max(first - offset, 0), min(last - offset, segment.used)
        if begin < end:
            parts = {name: part.to(device) for name, part in segment.read(begin, end).items()}
            yield parts, (end - begin) * block_length
        offset += segment.used
