"""Checks of the operations on a cache between updates: each against the same one on plain tensors."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from kvq.cache.kvq import KVQ
from kvq.errors import CheckNotApplicableError
from kvq.testing.case import ContractCase, feed, is_same, require

FLUSHES = 3
BATCH = 3
States = tuple[torch.Tensor, torch.Tensor]


def check_operations(case: ContractCase) -> None:
    """Reorder, repeat, select, crop and reset change a cache as they change the states that it holds."""
    order, chosen = torch.tensor([2, 0, 0]), torch.tensor([2, 1])
    stored = case.flush_length()
    operations: dict[str, tuple[Callable[[KVQ], object], Callable[[torch.Tensor], torch.Tensor]]] = {
        "reorder_cache": (lambda cache: cache.reorder_cache(order), lambda states: states[order]),
        "batch_repeat_interleave": (
            lambda cache: cache.batch_repeat_interleave(2),
            lambda states: states.repeat_interleave(2, dim=0),
        ),
        "batch_select_indices": (lambda cache: cache.batch_select_indices(chosen), lambda states: states[chosen]),
        "a crop within the window": (lambda cache: cache.crop(-3), lambda states: states[:, :, :-3]),
        "a crop into the store": (
            lambda cache: cache.crop(-(cache.get_seq_length() - stored - 3)),
            lambda states: states[:, :, : stored + 3],
        ),
    }
    for name, (operate, expect) in operations.items():
        cache = _fill(case)
        expected = _read(cache)
        operate(cache)
        _compare(cache, (expect(expected[0]), expect(expected[1])), f"after {name}")
        _check_goes_on(case, cache, name)
    cache = _fill(case)
    cache.reset()
    require(cache.get_seq_length() == 0, "after reset the cache holds tokens")
    _feed_more(case, cache, batch=BATCH, tokens=case.tokens_for(FLUSHES), seed=0)
    _compare(cache, _read(_fill(case)), "filled again after reset")


def check_copies(case: ContractCase) -> None:
    """A fork and a deep copy hold the same tokens, and neither changes with the original or changes it."""
    makers: dict[str, Callable[[KVQ], KVQ]] = {"fork": KVQ.fork, "deepcopy": copy.deepcopy}
    for name, make in makers.items():
        original = _fill(case)
        held = _read(original)
        other = make(original)
        _compare(other, held, f"the {name}")
        _feed_more(case, other, batch=BATCH, tokens=2 * case.flush_length(), seed=50)
        _compare(original, held, f"after its {name} went on, the original")
        theirs = _read(other)
        _feed_more(case, original, batch=BATCH, tokens=2 * case.flush_length(), seed=60)
        _compare(other, theirs, f"after the original went on, the {name}")
        alone = _fill(case)
        _feed_more(case, alone, batch=BATCH, tokens=2 * case.flush_length(), seed=60)
        _compare(original, _read(alone), f"with a {name} beside it, the original")


def check_save_and_load(case: ContractCase) -> None:
    """A saved cache is read back bit for bit, and continues as the original does."""
    if not hasattr(KVQ, "save"):
        raise CheckNotApplicableError("this version of kvq saves no cache")
    if case.backend.name not in _known_names():
        raise CheckNotApplicableError(f"{case.backend.name!r} is not registered, so no file can name it")
    original = _fill(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.kvq"
        original.save(path)
        loaded = KVQ.load(path)
        _compare(loaded, _read(original), "read back")
        for cache in (original, loaded):
            _feed_more(case, cache, batch=BATCH, tokens=2 * case.flush_length(), seed=70)
        _compare(loaded, _read(original), "read back and continued")


def _known_names() -> set[str]:
    from kvq.registry import available_backends

    return {info.name for info in available_backends()}


def _fill(case: ContractCase) -> KVQ:
    cache = case.cache()
    _feed_more(case, cache, batch=BATCH, tokens=case.tokens_for(FLUSHES), seed=0)
    return cache


def _feed_more(case: ContractCase, cache: KVQ, *, batch: int, tokens: int, seed: int) -> None:
    # Rows of different magnitude: rows that change places show.
    scale = torch.arange(1, batch + 1, dtype=torch.float32)[:, None, None, None]
    keys, values = (case.states(tokens, batch=batch, seed=seed + i) for i in (1, 2))
    feed(cache, keys * scale.to(keys), values * scale.to(values))


def _read(cache: KVQ) -> States:
    keys, values = cache.materialize(0)
    return keys, values


def _compare(cache: KVQ, expected: States, subject: str) -> None:
    for name, found, wanted in zip(("keys", "values"), _read(cache), expected, strict=True):
        require(is_same(found, wanted), f"{subject}: the {name} differ from the same operation on plain tensors")


def _check_goes_on(case: ContractCase, cache: KVQ, name: str) -> None:
    """Check that the cache takes more tokens, stores them, and keeps the tokens that it held."""
    held = _read(cache)
    rows, length = held[0].shape[0], cache.get_seq_length()
    added = 2 * case.flush_length() + 40
    _feed_more(case, cache, batch=rows, tokens=added, seed=80)
    require(
        cache.get_seq_length() == length + added, f"after {name} and {added} tokens: {cache.get_seq_length()} tokens"
    )
    found = _read(cache)
    stored = case.flush_length()
    for side, old, new in zip(("keys", "values"), held, found, strict=True):
        require(is_same(new[:, :, :stored], old[:, :, :stored]), f"after {name} and more tokens stored {side} changed")
        require(new.isfinite().all(), f"after {name} and more tokens the {side} are not finite")
