"""No file that is not exactly what was written is taken for it.

All mutations run with KVQ_FUZZ=all (`make fuzz`), else a part of them spread over all fields.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import mutated_files as mutated
import pytest
import torch
from cache_files import assert_equal, fill, mixed_cache, opaque_cache, rotated_cache, window_cache
from torch.utils._python_dispatch import TorchDispatchMode

from kvq import KVQ
from kvq.errors import KVQError

EVERYTHING = os.environ.get("KVQ_FUZZ") == "all"
STEP = 1 if EVERYTHING else 101
ALLOCATED_BYTES = 1 << 26
"""More than any quantizer of these tests needs; what a header may demand is limited only by its numbers."""
CACHES = {"mixed": mixed_cache, "opaque": opaque_cache, "rotated": rotated_cache, "window": window_cache}
UNSIGNED_MEANING = {"config", "starts", "padding", "format", "dropped", "sliding_window"}
"""Fields in which another value makes another, equally good file once the checksum is made to fit."""


class AllocationLimit(TorchDispatchMode):
    """Fails where an operation returns more than a file of some kilobytes can ask for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            assert result.numel() * result.element_size() <= ALLOCATED_BYTES, f"{func} allocated {list(result.shape)}"
        return result


class Judge:
    """Loads mutated files and counts what became of them."""

    def __init__(self, folder):
        self.path = folder / "mutated.safetensors"
        self.outcomes = Counter()

    def load(self, data, **options):
        self.path.write_bytes(data)
        try:
            with AllocationLimit():
                cache = KVQ.load(self.path, **options)
        except KVQError:
            self.outcomes["refused"] += 1
            return None
        self.outcomes["accepted"] += 1
        return cache

    def judge(self, mutation, pristine):
        cache = self.load(mutation.build())
        if cache is None:
            return
        assert mutation.signed, f"a change of {mutation.path} was not seen"
        if not UNSIGNED_MEANING & set(mutation.path) and "exchange" not in mutation.path:
            assert_equal(cache, pristine)
        for index in range(len(cache.layers)):
            sees_others = mutation.path[-1] != "sliding_window"  # else 1 is a good number
            assert all(states.shape[2] for states in cache.materialize(index)) or not sees_others
        assert cache.memory().total_bytes > 0
        with suppress(KVQError):
            fill(cache, 40, layers=len(cache.layers), seed=5)


@pytest.fixture
def judge(tmp_path):
    return Judge(tmp_path)


@pytest.fixture
def saved(request, tmp_path):
    cache = CACHES[request.param]()
    token_ids = torch.arange(2 * cache.get_seq_length()).reshape(2, -1)
    cache.save(tmp_path / "cache.safetensors", token_ids=token_ids)
    return cache, (tmp_path / "cache.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("saved", CACHES, indirect=True)
def test_a_mutated_file_is_refused(saved, judge, record_property):
    cache, data = saved
    assert mutated.Image(data).build(sign=True)  # put together again it is a good file
    assert_equal(judge.load(mutated.Image(data).build(sign=True)), cache)
    mutations = [*mutated.by_field(data), *mutated.by_name(data), *mutated.by_byte(data, 500, seed=1)]
    for mutation in (*mutations[::STEP], *mutated.of_no_kind()):
        judge.judge(mutation, cache)
    record_property("mutated files", judge.outcomes.total())
    assert len(mutations) > 10_000
    assert judge.outcomes["refused"] > 100
