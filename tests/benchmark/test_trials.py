"""Contenders at work: the same states for each, flushes where they are foretold, memory as it is counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, QuantizedCache

from kvq import KVQ
from kvq.benchmark.baselines import BufferLayer, packed_attention_forward, register_packed_attention
from kvq.benchmark.clock import peak_above_end, time_call, transient_bytes
from kvq.benchmark.contenders import BUFFER, DYNAMIC, backend_configs, list_baselines, list_own, list_peers
from kvq.benchmark.flush import flush_interval, steps_before_flush
from kvq.benchmark.setting import Setting, Shape
from kvq.benchmark.trial import LayerTrial

CPU = torch.device("cpu")
SMALL = Setting(Shape(query_heads=4, heads=2, head_dim=64), 320, 2, torch.float32, CPU)


@pytest.fixture(autouse=True)
def _attentions():
    register_packed_attention()


def all_contenders():
    return [*list_baselines(), *list_peers(4), *list_own(backend_configs(["native"], 4))]


def by_label(contenders):
    """Return parameters of tests; transformers' quanto cache compiles an extension at its first step."""
    return [
        pytest.param(one, id=one.label, marks=[pytest.mark.costly] if one.label == "transformers quanto 4" else [])
        for one in contenders
    ]


def filled(contender, setting=SMALL, spare=200):
    trial = LayerTrial(contender, setting, spare)
    with torch.inference_mode():
        trial.fill()
    return trial


def exact_output(trial):
    """Attention in float64 over the history and the token of the step, by its definition."""
    keys, values = (torch.cat(pair, dim=2).double() for pair in _states(trial))
    query = trial.query.double()
    groups = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
    weights = functional.softmax(query @ keys.transpose(-1, -2) / trial.setting.shape.head_dim**0.5, dim=-1)
    return (weights @ values).transpose(1, 2)


def _states(trial):
    keys, values = trial.setting.history(0)
    return (keys, trial.key), (values, trial.value)


@pytest.mark.parametrize("contender", by_label(all_contenders()))
def test_each_contender_attends_to_the_same_states(contender):
    trial = filled(contender)
    trial.prepare(5)
    expected = exact_output(trial)
    with torch.inference_mode():
        output = trial.step()
    error = ((output.double() - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if contender.kind == "full precision" else 0.2)
    assert contender.kind == "full precision" or error > 1e-4, "the history is quantized"


def test_a_step_of_the_same_number_reads_the_same_everywhere_and_another_number_something_else():
    first, second = (filled(contender) for contender in list(list_baselines())[:2])
    first.prepare(3)
    second.prepare(3)
    assert torch.equal(first.query, second.query)
    second.prepare(4)
    assert not torch.equal(first.query, second.query)


def quantizing_steps(trial, monkeypatch, count):
    """Take single steps and return at which of them anything was quantized."""
    done, calls = [], []
    layer = trial.cache.layers[0]
    if isinstance(trial.cache, KVQ):
        original = type(layer.side("key").codec).encode
        owner, name = type(layer.side("key").codec), "encode"
    else:
        original = type(layer)._quantize
        owner, name = type(layer), "_quantize"
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    for number in range(count):
        calls.clear()
        trial.step()
        if calls:
            done.append(number)
    return done


@pytest.mark.parametrize(
    "contender",
    by_label([*[one for one in list_peers(4) if "fp8" not in one.label], *list_own(backend_configs(["native"], 4))]),
)
def test_a_flush_comes_when_it_is_foretold(contender, monkeypatch):
    trial = filled(contender)
    foretold, interval = steps_before_flush(trial.cache), flush_interval(trial.cache)
    with torch.inference_mode():
        steps = quantizing_steps(trial, monkeypatch, foretold + interval + 1)
    assert steps == [foretold, foretold + interval]


def test_extending_by_what_is_foretold_makes_the_next_step_flush():
    trial = filled(next(iter(list_own(backend_configs(["native"], 4)))))
    with torch.inference_mode():
        trial.extend(steps_before_flush(trial.cache))
        assert steps_before_flush(trial.cache) == 0
        stored = trial.cache.layers[0].side("key").store.length
        trial.step()
    assert trial.cache.layers[0].side("key").store.length > stored


def test_caches_that_never_flush_foretell_none():
    assert steps_before_flush(DynamicCache()) is None
    assert flush_interval(filled(next(iter(list_baselines()))).cache) is None
    assert steps_before_flush(QuantizedCache("fp8", config=SMALL.shape.config())) is None


def test_a_buffer_holds_what_was_written_and_never_moves():
    layer, states = BufferLayer(40), torch.randn(1, 2, 10, 8)
    keys, values = layer.update(states, 2 * states)
    address = keys.data_ptr()
    for _ in range(3):
        keys, values = layer.update(states, 2 * states)
    assert torch.equal(keys, torch.cat([states] * 4, dim=2))
    assert torch.equal(values, 2 * keys)
    assert keys.data_ptr() == address
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (40, (41, 0))


@pytest.mark.parametrize("groups", [1, 4])
def test_packed_queries_attend_as_queries_apart(groups):
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    query, keys, values = torch.randn(2, 3 * groups, 1, 16), torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 24)
    output, weights = packed_attention_forward(module, query, keys, values, None, scaling=0.3)
    apart = [
        functional.scaled_dot_product_attention(
            query[:, head], keys[:, head // groups], values[:, head // groups], scale=0.3
        )
        for head in range(3 * groups)
    ]
    torch.testing.assert_close(output, torch.stack(apart, dim=2).squeeze(3).reshape(2, 1, 3 * groups, 24))
    assert weights is None


def test_the_peak_is_counted_above_where_memory_ends():
    assert peak_above_end([100, 50, -100, 20, -20]) == 100
    assert peak_above_end([10, 10]) == 0
    assert peak_above_end([-30, 80, -40]) == 40
    assert peak_above_end([]) == 0


@pytest.mark.parametrize(("label", "low", "high"), [(DYNAMIC, 1.0, 1.1), (BUFFER, 0.0, 0.1)])
def test_transient_memory_is_that_of_what_is_copied(label, low, high):
    """DynamicCache concatenates one side while the old one still exists; a buffer copies nothing."""
    contender = next(one for one in list_baselines() if one.label == label)
    trial = filled(contender, Setting(SMALL.shape, 4096, 1, torch.float32, CPU))
    with torch.inference_mode():
        counted = transient_bytes(trial.step, CPU)
    one_side = trial.setting.states_bytes / 2
    assert low * one_side <= counted <= high * one_side


def test_a_call_is_timed_in_milliseconds(monkeypatch):
    moments = iter([10.0, 10.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    assert time_call(lambda: None, CPU) == 250.0
