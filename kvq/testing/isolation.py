"""Checks that quantizers share no state: neither two layers, nor two caches, nor two threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvq.plugin_api.quantizer import Side
from kvq.testing.case import ContractCase, encode_blocks, feed, is_same, require

THREADS = 4
FLUSHES = 3
SWITCH_SECONDS = 1e-5


def check_independent(case: ContractCase) -> None:
    """Layers, sides and caches that take turns give the same results as each alone."""
    places: tuple[tuple[Side, int], ...] = (("key", 0), ("value", 0), ("key", 1))
    length = case.quantizer().block_length
    states = {place: case.states(length, seed=10 + i) * 10.0**i for i, place in enumerate(places)}
    alone = {place: _run_block(case, place, states[place]) for place in places}
    quantizers = {place: case.quantizer(*place) for place in places}
    parts = {place: encode_blocks(quantizers[place], states[place]) for place in places}
    for place in reversed(places):
        restored = torch.empty_like(states[place])
        quantizers[place].decode_into(parts[place], restored)
        side, layer = place
        require(is_same(restored, alone[place]), f"the {side}s of layer {layer} change with other quantizers around")


def check_threads(case: ContractCase) -> None:
    """Caches filled by threads in parallel hold the same as caches filled one after the other."""
    tokens = case.tokens_for(FLUSHES)
    states = [(case.states(tokens, seed=20 + i), case.states(tokens, seed=40 + i)) for i in range(THREADS)]
    expected = [_run_cache(case, *pair) for pair in states]
    found: dict[int, tuple[torch.Tensor, torch.Tensor] | BaseException] = {}
    start = threading.Barrier(THREADS)

    def work(index: int) -> None:
        start.wait()
        try:
            found[index] = _run_cache(case, *states[index])
        except BaseException as error:  # noqa: BLE001  # foreign code in a thread; it is raised to the caller below
            found[index] = error

    with _frequent_switches():
        threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, pair in enumerate(expected):
        result = found[index]
        if isinstance(result, BaseException):
            require(False, f"in a thread beside others: {type(result).__name__}: {result}")
        else:
            same = all(is_same(one, other) for one, other in zip(result, pair, strict=True))
            require(same, "threads with a cache each affect each other: the states read back differ")


def _run_block(case: ContractCase, place: tuple[Side, int], states: torch.Tensor) -> torch.Tensor:
    quantizer = case.quantizer(*place)
    restored = torch.empty_like(states)
    quantizer.decode_into(encode_blocks(quantizer, states), restored)
    return restored


def _run_cache(case: ContractCase, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cache = case.cache()
    step = case.flush_length() // 2
    sizes = [step] * (keys.shape[2] // step) + [keys.shape[2] % step]
    feed(cache, keys, values, sizes)
    read = cache.materialize(0)
    return read[0], read[1]


@contextmanager
def _frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
