"""Divergences from the states before the last projection, against those of all logits in float64."""

from __future__ import annotations

import pytest
import torch
from random_texts import make_text
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from kvq import KVQCacheConfig
from kvq.tuning import judging
from kvq.tuning.judging import Head
from kvq.tuning.probing import Probes
from kvq.tuning.side_setting import Pair, SideSetting

SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def wide():
    """A model with more tokens in its vocabulary than are counted by themselves."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=3000, initializer_range=0.1, **SHAPE)).eval()


@torch.inference_mode()
def judge_moved(model, size):
    """Divergences of states that have moved by something random, as judged, and as all logits have them in float64."""
    head, tokens = Head(model), torch.randint(3000, (2, 40), generator=torch.Generator().manual_seed(1))
    with head.listening():
        logits = model(tokens).logits
    judge = head.make_judge(logits, tokens)
    states = head._states
    noise = torch.randn(3, *states.shape, generator=torch.Generator().manual_seed(2))
    moved = states + size * torch.tensor([1.0, 0.5, 0.0])[:, None, None, None] * noise
    weights = model.lm_head.weight.double()
    expected, found = (weights @ one.double()[..., None] for one in (states, moved))
    plain, other = expected[..., 0].log_softmax(-1), found[..., 0].log_softmax(-1)
    return judge(moved.flatten(0, 1)).unflatten(0, (3, 2)), (plain.exp() * (plain - other)).sum(-1)


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3])
def test_few_tokens_of_the_vocabulary_tell_the_divergence(wide, size):
    """The mean is off by less than the drawing explains: 80 tokens, each from 128 that stand for most of the rest."""
    found, exact = judge_moved(wide, size)
    for one, true in zip(found[:2], exact[:2], strict=True):
        assert float(one.mean()) == pytest.approx(float(true.mean()), rel=0.05)
        assert (one.double() / true - 1).abs().max() < 0.6
    assert not found[2].any()


def test_drawn_tokens_count_as_much_as_all_that_they_stand_for():
    """The entropy of a distribution comes out, which is larger than that of its likeliest tokens."""
    logits = 2 * torch.randn(2, 30, 3000, generator=torch.Generator().manual_seed(3))
    tokens, shares = judging._draw(logits)
    likelihoods = logits.double().log_softmax(-1)
    entropy = -(likelihoods.exp() * likelihoods).sum(-1)
    found = -(shares[..., 0] * likelihoods.gather(-1, tokens)).sum(-1)
    assert (found / entropy - 1).abs().max() < 0.05
    kept = likelihoods.topk(judging.LIKELIEST).values
    assert ((-(kept.exp() * kept).sum(-1) / kept.exp().sum(-1)) / entropy).max() < 0.9


def test_it_is_exact_where_all_tokens_are_counted(wide, monkeypatch):
    monkeypatch.setattr(judging, "LIKELIEST", 2990)
    monkeypatch.setattr(judging, "DRAWN", 9)
    found, exact = judge_moved(wide, 0.01)
    torch.testing.assert_close(found[:2].double(), exact[:2], rtol=1e-2, atol=0)


def test_probes_leave_the_projection_out(wide):
    calls = []
    probes = Probes(wide, make_text(1), KVQCacheConfig(backend="native", residual_length=16), prefill=100, step=32)
    handle = wide.lm_head.register_forward_hook(lambda _, __, output: calls.append(output.shape[-1]))
    (found,) = probes.measure([{1: Pair(SideSetting("native", 2), None)}])
    handle.remove()
    assert set(calls) == {64}
    assert found.mean() > 0
    assert "forward" not in wide.lm_head.__dict__


def test_a_model_that_scales_its_logits_is_compared_by_them():
    torch.manual_seed(0)
    shape = {**SHAPE, "logit_scale": 0.25}
    model = CohereForCausalLM(CohereConfig(num_hidden_layers=2, vocab_size=3000, initializer_range=0.1, **shape)).eval()
    probes = Probes(model, make_text(1), KVQCacheConfig(backend="native", residual_length=16), prefill=100, step=32)
    assert not probes._head.is_left_out
    assert probes.measure([{0: Pair(SideSetting("native", 2), None)}])[0].mean() > 0
