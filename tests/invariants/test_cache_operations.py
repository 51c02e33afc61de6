"""Invariant 4: through every operation of a cache the same as DynamicCache, but for the quantization."""

import copy
import pickle
from collections import Counter
from typing import ClassVar

import pytest
import torch
from drawn_cases import DTYPES, QUANTIZATIONS, cases, example_count, feed, is_same, stored_bytes, stored_length
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvq import KVQ
from kvq.errors import StatesError
from kvq.layers.quantized_layer import DEFERRED_LENGTH

MAX_ROWS = 8
STEP_COUNT = 25
LEAST_TELLING_STEPS = 10
"""Of each operation in one run; one done on an empty cache tells nothing."""


class Operations(RuleBasedStateMachine):
    """Draws what is done; a subclass says what it means for the cache under test and for its reference."""

    batch = 0
    length = 0
    seed = 0
    steps: ClassVar[Counter]

    @property
    def is_telling(self):
        """Whether an operation could go wrong now."""
        raise NotImplementedError

    def count(self, operation):
        self.steps[operation, self.is_telling] += 1

    def bring(self, tokens):
        raise NotImplementedError

    def apply(self, method, argument, rows=None):
        raise NotImplementedError

    @rule(tokens=st.integers(0, 3) | st.integers(20, 100))
    def update(self, tokens):
        self.count("update")
        self.add(tokens)

    def add(self, tokens):
        self.seed += 1
        self.bring(tokens)
        self.length += tokens

    # DynamicCache ignores these where it holds no tokens.
    @precondition(lambda self: self.length)
    @rule(removed=st.integers(0, 10) | st.integers(0, 70) | st.integers(0, 300))
    def crop(self, removed):
        self.count("crop")
        self.apply("crop", -removed)
        self.length = max(0, self.length - removed)

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data):
        self.count("reorder")
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.apply("reorder_cache", torch.tensor(rows), rows)

    @precondition(lambda self: self.length and self.batch * 2 <= MAX_ROWS)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        repeats = min(repeats, MAX_ROWS // self.batch)
        self.count("repeat")
        self.apply("batch_repeat_interleave", repeats, [row for row in range(self.batch) for _ in range(repeats)])

    @precondition(lambda self: self.length)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data, as_mask):
        self.count("select")
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=self.batch, unique=True))
        if as_mask:
            mask = torch.zeros(self.batch, dtype=torch.bool)
            mask[rows] = True
            self.apply("batch_select_indices", mask, sorted(rows))
        else:
            self.apply("batch_select_indices", torch.tensor(rows), rows)


class BesideDynamicCache(Operations):
    """A cache whose window is never full, beside transformers' own."""

    layers = 2
    steps: ClassVar = Counter()

    # Rules are left out of some examples at random: without tokens from the start, `update` would be missing in many.
    @initialize(batch=st.integers(1, 4), dtype=st.sampled_from(DTYPES), tokens=st.integers(0, 40))
    def start(self, batch, dtype, tokens):
        self.batch, self.dtype = batch, dtype
        self.ours, self.theirs = KVQ(residual_length=10_000), DynamicCache()
        self.forks = []
        if tokens:
            self.add(tokens)

    @property
    def is_telling(self):
        return self.length > 0

    def bring(self, tokens):
        for layer in range(self.layers):
            generator = torch.Generator().manual_seed(self.seed * 2 + layer)
            keys, values = (
                torch.randn(self.batch, 2, tokens, dim, generator=generator).to(self.dtype) for dim in (8, 16)
            )
            found, expected = (cache.update(keys, values, layer) for cache in (self.ours, self.theirs))
            assert is_same(found[0], expected[0])
            assert is_same(found[1], expected[1])

    def apply(self, method, argument, rows=None):
        for cache in (self.ours, self.theirs):
            getattr(cache, method)(argument)
        self.batch = self.batch if rows is None else len(rows)

    @rule(tokens=st.integers(0, 40))
    def reset(self, tokens):
        self.count("reset")
        self.ours.reset()
        # Before 5.18 a reset DynamicCache keeps its tokens as zeros; the later meaning is the contract.
        self.theirs.layers = [DynamicLayer() for _ in self.theirs.layers]
        self.length = 0
        if tokens:
            self.add(tokens)

    @precondition(lambda self: not any(layer.is_initialized for layer in self.theirs.layers))
    @rule(data=st.data())
    def operate_on_nothing(self, data):
        self.count("nothing")
        rows = torch.arange(self.batch)
        operation, argument = data.draw(st.sampled_from([
            ("reorder_cache", rows), ("batch_repeat_interleave", 2), ("batch_select_indices", rows), ("crop", -3)
        ]))  # fmt: skip
        for cache in (self.ours, self.theirs):
            getattr(cache, operation)(argument)

    @rule(copier=st.sampled_from([KVQ.fork, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))  # noqa: S301
    def go_on_with_a_copy(self, copier):
        self.count("copy")
        self.forks.append((self.ours, copy.deepcopy(self.theirs)))
        self.ours = copier(self.ours)

    @rule()
    def record_the_past(self):
        self.count("record")
        for cache in (self.ours, self.theirs):
            cache.activate_past_recording()
            cache.crop(0)
        assert (self.ours.is_croppable, len(self.ours)) == (self.theirs.is_croppable, len(self.theirs))

    @rule(tokens=st.integers(0, 9))
    def ask_for_mask_sizes(self, tokens):
        self.count("mask sizes")
        for layer in range(self.layers):
            assert self.ours.get_mask_sizes(tokens, layer) == self.theirs.get_mask_sizes(tokens, layer)

    @invariant()
    def both_hold_the_same(self):
        pairs = [(self.ours, self.theirs)] if hasattr(self, "ours") else []
        for ours, theirs in pairs + getattr(self, "forks", [])[-1:]:
            assert len(ours.layers) == len(theirs.layers)
            assert ours.get_seq_length() == theirs.get_seq_length()
            for one, other in zip(ours.layers, theirs.layers, strict=True):
                if theirs.get_seq_length():
                    assert is_same(one.keys, other.keys)
                    assert is_same(one.values, other.values)


class BesideItsOwnStates(Operations):
    """A quantized layer beside the states that it gave out: what is stored stays, what is exact is exact."""

    steps: ClassVar = Counter()

    @initialize(quantization=st.sampled_from(QUANTIZATIONS), data=st.data())
    def start(self, quantization, data):
        self.case = data.draw(cases(quantization))
        self.batch, self.starts = self.case.batch, list(self.case.starts)
        self.layer = self.case.layer()
        self.held = [side[:, :, :0] for side in self.case.states(1)]
        self.left_behind = None
        self.survivors = {}
        self.add(data.draw(st.just(0) | st.just(self.case.tokens)))

    @property
    def is_telling(self):
        return self.layer.is_initialized and stored_length(self.layer) > 0

    def states(self, tokens):
        drawn = self.case.states(tokens, self.seed)
        rows = torch.arange(self.batch) % self.case.batch
        return [side[rows] for side in drawn]

    def bring(self, tokens):
        new = self.states(tokens)
        stored = stored_length(self.layer) if self.layer.is_initialized else 0
        before = stored_bytes(self.layer)
        returned = self.layer.update(*new)
        given = [torch.cat(pair, dim=2) for pair in zip(self.held, new, strict=True)]
        for found, expected in zip(returned, given, strict=True):
            assert is_same(found, expected)
        self.assert_prefix(before, stored)
        for index, expected in enumerate(given):
            held = (self.layer.keys, self.layer.values)[index]
            exact = self.exact_tokens(expected.shape[2], stored)
            assert is_same(held.transpose(1, 2)[exact], expected.transpose(1, 2)[exact])
            assert (held - expected).abs().max() <= 3 * expected.abs().max() if tokens else True
            self.held[index] = held

    def exact_tokens(self, total, stored):
        """Return a mask `[B, T]`: what was stored before, the sinks, and what is in the window."""
        position, starts = torch.arange(total), torch.tensor(self.starts)[:, None]
        is_sink = (position >= starts) & (position < starts + self.case.sink_length)
        return is_sink | (position < stored) | (position >= stored_length(self.layer))

    def assert_prefix(self, before, stored):
        """Assert that the packed bytes of the first `stored` tokens are those of `before`."""
        after = stored_bytes(self.layer)
        for (side, part), tensor in before.items():
            blocks = stored // self.layer.side(side).store.block_length
            assert torch.equal(after[side, part][:, :, :blocks], tensor[:, :, :blocks]) if blocks else True

    def apply(self, method, argument, rows=None):
        before = stored_bytes(self.layer)
        stored = stored_length(self.layer) if self.layer.is_initialized else 0
        getattr(self.layer, method)(argument)
        if rows is None:
            self.expect_crop(max(0, self.length + argument), stored)
        else:
            self.held = [side[rows] for side in self.held]
            self.survivors = {start: [side[rows] for side in states] for start, states in self.survivors.items()}
            before = {part: tensor[rows] for part, tensor in before.items()}
            self.batch, self.starts = len(rows), [self.starts[row] for row in rows]
        if self.layer.is_initialized:
            self.assert_prefix(before, stored_length(self.layer))

    def expect_crop(self, kept, stored):
        """Expect what was given out, but for survivors of a group that was cut before: these as they were then."""
        self.held = [side[:, :, :kept] for side in self.held]
        self.survivors = {
            start: [side[:, :, : kept - start] for side in states]
            for start, states in self.survivors.items()
            if start < kept
        }
        start = kept // self.case.flush_length * self.case.flush_length
        if kept < stored and start < kept:
            known = self.survivors.get(start, [side[:, :, :0] for side in self.held])
            self.held = [
                torch.cat([side[:, :, :start], old, side[:, :, start + old.shape[2] :]], dim=2)
                for side, old in zip(self.held, known, strict=True)
            ]
            self.survivors[start] = [side[:, :, start:] for side in self.held]

    @precondition(lambda self: self.layer.is_initialized)
    @rule(copier=st.sampled_from([lambda layer: layer.fork(), copy.deepcopy]))
    def go_on_with_a_copy(self, copier):
        self.count("copy")
        self.left_behind = (self.layer, [side.clone() for side in self.held])
        self.layer = copier(self.layer)

    @precondition(lambda self: self.layer.is_initialized)
    @rule(fault=st.sampled_from(["rows", "dtype", "quantizer"]))
    def a_refused_update(self, fault):
        self.count("refused update")
        keys, values = self.states(self.case.residual_length + self.case.flush_length)
        if fault == "quantizer":
            with FailingQuantizer(self.layer.side("value").codec):
                try:
                    self.layer.update(keys, values)
                except OutOfMemoryError:
                    return
                raise AssertionError("the failure of the quantizer was hidden")
        if fault == "dtype":
            keys = keys.double()
        else:
            keys, values = keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)
        try:
            self.layer.update(keys, values)
        except StatesError:
            return
        raise AssertionError(f"{fault}: not refused")

    @invariant()
    def it_gives_out_what_it_gave_out_before(self):
        for layer, held in [(self.layer, self.held), *([self.left_behind] if self.left_behind else [])]:
            if layer.is_initialized:
                assert layer.get_seq_length() == held[0].shape[2]
                assert is_same(layer.keys, held[0])
                assert is_same(layer.values, held[1])


class WhileThePastIsRecorded(RuleBasedStateMachine):
    """A layer that gets drafts and takes part of them back, beside one that gets what stays, token by token."""

    steps: ClassVar = Counter()

    @initialize(quantization=st.sampled_from(QUANTIZATIONS), data=st.data())
    def start(self, quantization, data):
        self.case = data.draw(cases(quantization))
        self.layer, self.grown = self.case.layer(), self.case.layer()
        self.layer.activate_past_recording()
        self.drafted, self.seed = [side[:, :, :0] for side in self.case.states(1)], 0
        self.draft(self.case.tokens)

    @rule(tokens=st.integers(1, 9) | st.integers(0, 60))
    def draft(self, tokens):
        self.seed += 1
        new = self.case.states(tokens, self.seed)
        self.steps["update", self.layer.is_initialized] += 1
        self.layer.update(*new, packed=True)
        self.drafted = [torch.cat(pair, dim=2) for pair in zip(self.drafted, new, strict=True)]
        self.verify_bound()

    @rule(removed=st.integers(0, 9) | st.integers(0, DEFERRED_LENGTH))
    def take_back(self, removed):
        removed = min(removed, self.drafted[0].shape[2])
        before = stored_length(self.layer)
        self.layer.crop(-removed)
        self.steps["crop", stored_length(self.layer) > before] += 1
        kept = [side[:, :, : side.shape[2] - removed] for side in self.drafted]
        feed(self.grown, kept, [1] * kept[0].shape[2])
        self.drafted = [side[:, :, :0] for side in self.drafted]
        if not self.grown.is_initialized:
            return
        expected = stored_bytes(self.grown)
        found = stored_bytes(self.layer)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[part], expected[part]) for part in expected)
        assert is_same(self.layer.keys, self.grown.keys)
        assert is_same(self.layer.values, self.grown.values)

    @rule(copier=st.sampled_from([lambda layer: layer.fork(), copy.deepcopy]))
    def go_on_with_a_copy(self, copier):
        self.steps["copy", stored_length(self.layer) > 0] += 1
        self.layer = copier(self.layer)

    def verify_bound(self):
        longest = max(self.case.residual_length + DEFERRED_LENGTH + self.case.flush_length, self.case.flush_length)
        assert all(side.window.length < longest for _, side in self.layer.sides())


class OutOfMemoryError(Exception):
    """What a quantizer may raise at any time."""


class FailingQuantizer:
    """Makes `encode` of a quantizer raise for a while."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def __enter__(self):
        def fail(states):
            raise OutOfMemoryError

        self.quantizer.encode = fail

    def __exit__(self, *exception):
        del self.quantizer.encode


@pytest.mark.parametrize("rows", [torch.tensor([1, 0]), torch.tensor([[1, 0], [0, 1]]).T[0]], ids=["own", "a view"])
def test_the_rows_of_a_reorder_stay_with_the_caller(rows):
    cache = KVQ()
    cache.update(*torch.randn(2, 2, 2, 300, 64), 0)
    cache.reorder_cache(rows)
    expected, held = cache.materialize(0), cache.memory().total_bytes
    rows.zero_()
    for found, before in zip(cache.materialize(0), expected, strict=True):
        assert is_same(found, before)
    other = KVQ()
    other.update(*torch.randn(2, 2, 2, 300, 64), 0)
    other.reorder_cache(torch.tensor([1, 0]))
    assert held == other.memory().total_bytes


def run_machine(
    machine, examples, record_property, operations=("update", "crop", "reorder", "repeat", "select", "copy")
):
    """Run a state machine; a run that left out an operation, or did it on an empty cache only, fails too."""
    machine.steps.clear()
    chosen = settings(max_examples=example_count(examples), stateful_step_count=STEP_COUNT)
    run_state_machine_as_test(machine, settings=chosen)
    record_property("steps", machine.steps.total())
    telling = {operation: machine.steps[operation, True] for operation, _ in machine.steps if operation != "nothing"}
    assert telling.keys() >= set(operations)
    assert min(telling.values()) >= LEAST_TELLING_STEPS, telling


def test_beside_dynamic_cache(record_property):
    run_machine(BesideDynamicCache, 60, record_property)


@pytest.mark.case(
    "reorder, repeat and select rows of a batch",
    "stored tokens follow like those of the window",
    report="huggingface/transformers#45510",
)
def test_beside_its_own_states(record_property):
    run_machine(BesideItsOwnStates, 80, record_property)


def test_while_the_past_is_recorded(record_property):
    run_machine(WhileThePastIsRecorded, 30, record_property, operations=("update", "crop", "copy"))
