"""Greedy continuations: where they part, and how far they drift, against a plain recursion and `generate`."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig
from kvq.attention.hint import without_hint
from kvq.evaluation.quality.free_running import Divergence, cut_at_end, find_ends, levenshtein, write_on
from kvq.evaluation.quality.prefix import Prefix
from kvq.evaluation.quality.run import evaluate


def count_edits(one, other):
    """Return the edit distance by its definition."""

    @lru_cache(None)
    def best(i, j):
        if not i or not j:
            return i + j
        return min(best(i - 1, j) + 1, best(i, j - 1) + 1, best(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return best(len(one), len(other))


def test_the_distance_is_that_of_levenshtein():
    assert levenshtein([*map(ord, "kitten")], [*map(ord, "sitting")]) == 3
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 9, (2,), generator=generator).tolist()
        one, other = (torch.randint(3, (length,), generator=generator).tolist() for length in lengths)
        assert levenshtein(one, other) == count_edits(tuple(one), tuple(other))


@pytest.mark.parametrize(
    ("said", "expected", "first", "drift"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], math.inf, 0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2, 1 / 2),
        ([7, 8], [1, 2], 0, 1),
        ([1, 9, 2, 3, 4], [1, 2, 3, 4, 5], 1, 2 / 4),  # a word more, and the rest is as it was
        ([1, 2], [1, 2, 3, 4], 2, 1),  # the text ends early
        ([1, 2, 3], [1, 2], 2, 1),
    ],
)
def test_a_continuation_is_told_by_its_first_difference_and_the_rest(said, expected, first, drift):
    assert Divergence.between(said, expected) == Divergence(first, drift)


def test_a_text_ends_with_its_first_end(loaded, monkeypatch):
    assert cut_at_end([4, 5, 2, 6, 2], frozenset({2, 3})) == [4, 5, 2]
    assert cut_at_end([4, 5], frozenset({2})) == [4, 5]
    for named, ends in ((2, {2}), ([2, 3], {2, 3}), (None, set())):
        monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", named)
        assert find_ends(loaded[0]) == ends


@pytest.mark.parametrize("fields", [None, {"nbits_v": 2, "residual_length": 16}])
def test_what_is_written_is_what_generate_writes(loaded, text, fields):
    model, tokens = loaded[0], text.sequences[:2, :300]

    def build():
        return DynamicCache() if fields is None else KVQ(KVQCacheConfig(**fields), model=model)

    with without_hint():
        prefix, cache = Prefix(model, tokens), build()
        prefix.give_to(cache)
        said = torch.cat(list(write_on(model, cache, prefix.logits, 20)), dim=1)
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": tokens >= 0}
        generated = model.generate(tokens, past_key_values=build(), **options)[:, 300:]
    assert torch.equal(said, generated)
    assert len(said.unique()) > 5


def test_a_run_lets_every_cache_write(make_plan):
    plan = make_plan(
        {
            "exact": {"residual_length": 4096},
            "one": {"nbits_k": 2, "nbits_v": 1, "backend": "native", "residual_length": 0},
        },
        continuation=40,
    )
    assert plan.prompt_length == 360
    exact, one = evaluate(plan)
    assert exact.first_difference == (math.inf,) * 3
    assert (exact.unchanged, exact.drift.mean) == (1, 0)
    assert one.unchanged < 0.5
    assert one.first_difference[1] < 40
    assert 0 < one.drift.mean <= 1
