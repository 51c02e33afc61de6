"""Probes against whole evaluations of the same settings, and what leaving out layers must not change."""

from __future__ import annotations

import pytest
import torch
from random_texts import LAYERS, make_text
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from kvq import KVQCacheConfig
from kvq.evaluation.quality.candidates import make_candidate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.run import evaluate
from kvq.tuning.layer_skipping import find_layer_modules
from kvq.tuning.probing import Probes
from kvq.tuning.side_setting import Pair, SideSetting, build_config

TWO, EIGHT = SideSetting("native", 2), SideSetting("native", 8)
SIZES = {"prefill": 100, "step": 16}


@pytest.fixture(scope="module")
def probes(model, text, base):
    return Probes(model, text, base, **SIZES)


def evaluated(model, text, config):
    plan = EvaluationPlan(model, text, [make_candidate("one", config)], None, batch_size=2, **SIZES)
    return evaluate(plan)[0].kl.mean


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 3), (0, 1, 2, 3)])
def test_a_probe_measures_what_an_evaluation_of_that_configuration_measures(probes, model, text, base, layers):
    assignment = dict.fromkeys(layers, Pair(TWO, SideSetting("native", 4)))
    (found,) = probes.measure([assignment])
    expected = evaluated(model, text, build_config(base, assignment, LAYERS))
    assert float(found.mean()) == pytest.approx(expected, rel=1e-3)
    assert found.shape == (2, 64)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("side", ["key", "value"])
def test_one_side_alone_costs_what_it_costs_beside_eight_bits(probes, model, text, base, layer, side):
    alone = {layer: Pair(TWO, None) if side == "key" else Pair(None, TWO)}
    beside = {layer: Pair(TWO, EIGHT) if side == "key" else Pair(EIGHT, TWO)}
    (found,) = probes.measure([alone])
    assert float(found.mean()) == pytest.approx(evaluated(model, text, build_config(base, beside, LAYERS)), rel=0.02)
    assert found.mean() > 1e-4


def test_probes_of_one_batch_do_not_change_each_other(probes):
    some = [{1: Pair(TWO, None)}, {1: Pair(None, TWO)}, {1: Pair(EIGHT, TWO)}, {}]
    together = probes.measure(some)
    for one, divergences in zip(some, together, strict=True):
        torch.testing.assert_close(divergences, probes.measure([one])[0], rtol=1e-3, atol=1e-7)
    assert not together[-1].gt(1e-6).any()


def test_layers_before_the_first_quantized_one_are_left_out(probes, model, text, base):
    assert probes.skips
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    skipped = probes.measure([{3: Pair(TWO, TWO)}])[0]
    assert calls == []
    plain = Probes(model, text, base, **SIZES)
    plain.skips = False
    torch.testing.assert_close(plain.measure([{3: Pair(TWO, TWO)}])[0], skipped, rtol=1e-3, atol=1e-7)
    handle.remove()
    assert calls
    assert "forward" not in model.model.layers[0].__dict__


def test_a_model_that_reads_earlier_layers_later_runs_all_of_them(model, text, base, monkeypatch):
    kept = []
    first, last = model.model.layers[0], model.model.layers[3]
    handles = [
        first.register_forward_hook(lambda _, __, output: kept.append(output)),
        last.register_forward_hook(lambda _, __, output: output + kept[-1][: len(output)]),
    ]
    probes = Probes(model, text, base, **SIZES)
    assert not probes.skips
    found = float(probes.measure([{3: Pair(TWO, TWO)}])[0].mean())
    expected = evaluated(model, text, build_config(base, {3: Pair(TWO, TWO)}, LAYERS))
    for handle in handles:
        handle.remove()
    assert found == pytest.approx(expected, rel=1e-3)


def test_layers_are_found_by_the_names_of_their_projections(model):
    assert find_layer_modules(model, LAYERS) == list(model.model.layers)
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))
    assert find_layer_modules(other, 2) == list(other.transformer.h)
    assert find_layer_modules(model, LAYERS + 1) == []


def test_a_sliding_model_is_probed_as_it_is_evaluated():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = MistralConfig(num_hidden_layers=3, vocab_size=199, sliding_window=64, initializer_range=0.2, **shape)
    model, text = MistralForCausalLM(config).eval(), make_text(4)
    base = KVQCacheConfig(backend="native", residual_length=16)
    probes = Probes(model, text, base, **SIZES)
    every = dict.fromkeys(range(3), Pair(TWO, TWO))
    together, alone = probes.measure([every, {1: Pair(TWO, None)}])
    assert float(together.mean()) == pytest.approx(evaluated(model, text, build_config(base, every, 3)), rel=1e-3)
    assert 0 < alone.mean() < together.mean()
    assert probes.measure([{}])[0].max() < 1e-6


def test_recording_leaves_no_hook_behind(probes, model):
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
