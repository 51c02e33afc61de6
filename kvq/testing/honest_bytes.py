"""The check of declared memory: a census of the process against the backend's declared effective bits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from kvq.cache.kvq import KVQ
from kvq.layers.savings import effective_bits
from kvq.testing.case import RESIDUAL_LENGTH, ContractCase, feed, quantized_layer, require
from kvq.testing.census import Census, begin_census
from kvq.testing.tensors import SIDES

PROMPT_LENGTH = 4096
HEAD_DIM = 128
DECODE_FLUSHES = 2
TOLERANCE = 0.05
"""Share of the declared bytes by which the census may differ."""
PYTHON_BYTES = 64 * 1024
"""Bytes that the objects around the tensors may take."""
MOST_OF_HALF_PRECISION = 0.75
"""Share of the same states in 16 bits that a cache of at most 8 bits may take."""


def check_honest_bytes(case: ContractCase) -> None:
    """At 4,096 tokens the process holds the bytes that the layout declares, after a prompt and after decode steps."""
    short, prompt, step = (_states(case, tokens) for tokens in (PROMPT_LENGTH // 8, PROMPT_LENGTH, 1))
    deque(_fill(case, short, step), maxlen=0)  # memory that a library keeps is there before the census
    with begin_census() as census:
        for cache, when in _fill(case, prompt, step):
            _compare(case, cache, census, when)


def check_constant_bytes(case: ContractCase) -> None:
    """Constants are as large after 4,096 tokens as before the first."""
    for side in SIDES:
        sizes = set()
        for tokens in (PROMPT_LENGTH // 8, PROMPT_LENGTH):
            cache = case.cache()
            states = _states(case, tokens)
            feed(cache, states, states)
            constants = quantized_layer(cache).side(side).codec.constants()
            sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in constants.values()))
        require(len(sizes) == 1, f"the constants of the {side}s grow with the tokens: {sorted(sizes)} bytes")


@torch.no_grad()
def _fill(case: ContractCase, prompt: torch.Tensor, step: torch.Tensor) -> Iterator[tuple[KVQ, str]]:
    """Yield a cache at the moments at which its bytes are counted, and the moment in words."""
    cache = case.cache()
    feed(cache, prompt, prompt)
    yield cache, "after the prompt"
    for _ in range(DECODE_FLUSHES * quantized_layer(cache).flush_length):
        feed(cache, step, step)
    cache.materialize(0)
    yield cache, "after decode steps and a look at the whole history"


def _compare(case: ContractCase, cache: KVQ, census: Census, when: str) -> None:
    held = census.count()
    least, most = _declared_bytes(case, cache)
    shown = f"{when} the process holds {held:,} bytes for {cache.get_seq_length():,} tokens"
    require(held <= most * (1 + TOLERANCE) + PYTHON_BYTES, f"{shown}; {most:,} are declared, constants included")
    require(held >= least * (1 - TOLERANCE), f"{shown}, fewer than the {least:,} that are declared")
    if case.nbits <= 8:
        half = 2 * 2 * _elements(case) * cache.get_seq_length()
        share = held / half
        require(share < MOST_OF_HALF_PRECISION, f"{shown}: {share:.2f} times the same states in 16 bits")


def _declared_bytes(case: ContractCase, cache: KVQ) -> tuple[int, int]:
    """Return the fewest and the most bytes of layout, window, room for future tokens and constants together."""
    layer = quantized_layer(cache)
    token_bytes = _elements(case) * case.dtypes[-1].itemsize
    sinks = cache.config.sink_length * token_bytes
    least = most = 0
    for _, side in layer.sides():
        bits = effective_bits(side.codec, HEAD_DIM)
        packed = math.ceil(bits * _elements(case) * side.store.length / 8)
        constants = sum(tensor.untyped_storage().nbytes() for tensor in side.codec.constants().values())
        room = packed * (sum(one.capacity for one in side.store.segments) / max(1, side.store.blocks) - 1)
        least += packed + RESIDUAL_LENGTH * token_bytes + sinks
        most += packed + math.ceil(room) + (RESIDUAL_LENGTH + 2 * layer.flush_length) * token_bytes + sinks + constants
    return least, most


def _elements(case: ContractCase) -> int:
    """Return the elements of one token of one side."""
    return _states(case, 1).numel()


def _states(case: ContractCase, tokens: int) -> torch.Tensor:
    return case.states(tokens, head_dim=HEAD_DIM, dtype=case.dtypes[-1])
