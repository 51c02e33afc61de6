"""Checks that stored tokens never change, and do not depend on how they arrived."""

from __future__ import annotations

import torch

from kvq.cache.kvq import KVQ
from kvq.testing.case import RESIDUAL_LENGTH, ContractCase, feed, is_same, quantized_layer, require

FLUSHES = 4


def check_append_only(case: ContractCase) -> None:
    """A stored token reads the same, bit for bit, however long generation goes on."""
    tokens = case.tokens_for(FLUSHES)
    keys, values = case.states(tokens, seed=1), case.states(tokens, seed=2) * 3
    keys[:, :, tokens // 2 :] *= 20  # later tokens differ from the earlier ones: a running scale would follow them
    cache = case.cache()
    seen: tuple[torch.Tensor, ...] = ()
    step = case.flush_length()
    for start in range(0, tokens, step):
        feed(cache, keys[:, :, start : start + step], values[:, :, start : start + step])
        stored = quantized_layer(cache).side("key").store.length
        read = tuple(side[:, :, :stored] for side in cache.materialize(0))
        for name, new, old in zip(("keys", "values"), read, seen, strict=False):
            same = is_same(new[:, :, : old.shape[2]], old)
            require(same, f"stored {name} change by the time {cache.get_seq_length()} tokens are held")
        seen = read
    require(seen[0].shape[2] >= FLUSHES * step, f"only {seen[0].shape[2]} tokens were stored")


def check_chunk_invariant(case: ContractCase) -> None:
    """The stored bits depend on the states alone, not on how updates or the batch split them."""
    tokens = case.tokens_for(FLUSHES)
    keys, values = case.states(tokens, batch=2, seed=3), case.states(tokens, batch=2, seed=4)
    whole = case.cache()
    feed(whole, keys, values)
    expected = whole.materialize(0)
    odd = [7] * (tokens // 7) + [tokens % 7]
    for name, sizes in {"one token at a time": [1] * tokens, "7 tokens at a time": odd}.items():
        cache = case.cache()
        feed(cache, keys, values, sizes)
        _compare(cache, expected, f"fed {name}, the cache holds other bits than fed at once")
    if not quantized_layer(whole).side("key").codec.group_local:
        return
    for row in range(2):
        cache = case.cache()
        feed(cache, keys[row : row + 1], values[row : row + 1])
        alone = tuple(side[row : row + 1] for side in expected)
        _compare(cache, alone, f"row {row} of a batch is stored as other bits than alone, though group_local is True")


def check_exact_ends(case: ContractCase) -> None:
    """The first tokens and the newest ones come back bit for bit, and those between them do not all."""
    tokens = case.tokens_for(FLUSHES)
    states = case.states(tokens, seed=5), case.states(tokens, seed=6)
    cache = case.cache()
    feed(cache, *states)
    sinks = cache.config.sink_length
    for name, found, given in zip(("keys", "values"), cache.materialize(0), states, strict=True):
        require(is_same(found[:, :, :sinks], given[:, :, :sinks]), f"the first {name} are not exact")
        newest = slice(tokens - RESIDUAL_LENGTH, None)
        require(is_same(found[:, :, newest], given[:, :, newest]), f"the newest {name} are not exact")
        stored = slice(sinks, quantized_layer(cache).side("key").store.length)
        require(not is_same(found[:, :, stored], given[:, :, stored]), f"stored {name} come back exact: kept elsewhere")


def _compare(cache: KVQ, expected: tuple[torch.Tensor, ...], problem: str) -> None:
    for name, found, wanted in zip(("keys", "values"), cache.materialize(0), expected, strict=True):
        require(is_same(found, wanted), f"{name}: {problem}")
