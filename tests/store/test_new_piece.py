"""A piece of state that is added to a side is counted, saved, moved, reordered, forked, undone and planned with it.

`Scores` and the field of `SideContents` are all that is added here: nothing else of kvq knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from kvq import KVQ
from kvq.errors import CacheFileError
from kvq.planning import plan
from kvq.store.held import Held
from kvq.store.side_contents import SideContents

ROWS, HEADS, DIM = 2, 2, 64


@dataclass(frozen=True, eq=False)
class Scores:
    """A number for each row."""

    values: torch.Tensor = field(default_factory=lambda: torch.arange(ROWS) + 5.0)

    def held(self):
        yield Held("scores", self.values)

    def saved(self):
        yield "scores", self.values

    def restored(self, tensors):
        return Scores(tensors["scores"])

    def select_rows(self, rows):
        return Scores(self.values[rows])

    def moved_to(self, device):
        return Scores(self.values.to(device))

    def shared(self):
        return self


@dataclass(frozen=True, eq=False)
class ScoredContents(SideContents):
    scores: Scores = field(default_factory=Scores)


@pytest.fixture
def scored(monkeypatch):
    monkeypatch.setattr("kvq.store.side.SideContents", ScoredContents)


def feed(cache, tokens=300):
    cache.update(*torch.randn(2, ROWS, HEADS, tokens, DIM), 0)
    return cache


def scores(cache, side="value"):
    return cache.layers[0].side(side).contents.scores.values.tolist()


@pytest.mark.usefixtures("scored")
def test_the_report_counts_it_in_a_column_of_its_own():
    memory, plain = feed(KVQ()).memory(), 2 * ROWS * 4
    assert memory.layers[0].key.held_bytes["scores"] == plain / 2
    assert memory.total_bytes == sum(side.total_bytes for side in (memory.layers[0].key, memory.layers[0].value))
    header = next(line for line in str(memory).splitlines() if "packed" in line)
    assert "scores" in header
    assert "scores" not in str(KVQ().memory())


@pytest.mark.usefixtures("scored")
def test_it_follows_its_side():
    cache = feed(KVQ())
    fork = cache.fork()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.move_to("cpu")
    assert (scores(cache), scores(fork)) == ([6, 5], [5, 6])
    fork.batch_repeat_interleave(2)
    assert scores(fork, "key") == [5, 5, 6, 6]


@pytest.mark.usefixtures("scored")
def test_a_change_that_fails_leaves_it(monkeypatch):
    cache = feed(KVQ())
    side = cache.layers[0].side("value")
    before = side.contents.scores

    def change_and_fail(states):
        side.contents = replace(side.contents, scores=Scores(torch.zeros(ROWS)))
        raise ZeroDivisionError

    monkeypatch.setattr(side.codec, "encode", change_and_fail)
    with pytest.raises(ZeroDivisionError):
        feed(cache)
    assert side.contents.scores is before


def test_a_file_holds_it_and_an_older_release_refuses_it(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr("kvq.store.side.SideContents", ScoredContents)
        cache = feed(KVQ())
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.save(tmp_path / "cache.safetensors")
        with safe_open(tmp_path / "cache.safetensors", "pt") as file:
            assert file.metadata()["format_version"] == "3", "releases before would call it damaged"
        assert scores(KVQ.load(tmp_path / "cache.safetensors")) == [6, 5]
    with pytest.raises(CacheFileError, match=r"holds \['scores'\], which this release does not know"):
        KVQ.load(tmp_path / "cache.safetensors")


@pytest.mark.usefixtures("scored")
def test_a_plan_counts_it():
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, intermediate_size=8, vocab_size=9
    )
    held = feed(KVQ(model=config)).memory().total_bytes
    assert plan(config, context=300, batch=ROWS, dtype=torch.float32).total_bytes == held
