"""The demo on a language model: its figures are those of `kvq eval`, its continuations those of `generate`."""

from __future__ import annotations

import pytest
import torch
from foreign_model import save_foreign_model
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig
from kvq.attention.hint import without_hint
from kvq.evaluation.demo import DemoCase
from kvq.evaluation.model_demo import plan_demo, run_demo
from kvq.evaluation.model_loading import load_model
from kvq.evaluation.quality.run import evaluate

FIELDS = {"backend": "native", "nbits_k": 2, "nbits_v": 2}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    model, tokenizer = load_model(str(save_foreign_model(tmp_path_factory.mktemp("model"))), device="cpu")
    cases = [DemoCase("full precision"), DemoCase("native", KVQCacheConfig(**FIELDS))]
    return plan_demo(model, tokenizer, cases)


@pytest.fixture(scope="module")
def row(plan):
    (row,) = run_demo(plan, lambda task, forwards: None)
    return row


def test_the_figures_are_those_of_an_evaluation(plan, row):
    (expected,) = evaluate(plan)
    assert (row.record.label, row.record.kl.mean) == ("native K2V2", expected.kl.mean)
    assert (row.record.top1, row.record.held_bytes) == (expected.top1, expected.held_bytes)
    assert row.record.kl.mean > 0


def test_no_cache_is_flattered_by_the_steps(plan):
    assert plan.step <= KVQCacheConfig().residual_length


def test_the_continuations_are_what_generate_writes(plan, row):
    prompt = plan.text.sequences[:, : plan.prompt_length]

    def generate(cache):
        options = {"max_new_tokens": plan.continuation, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        with without_hint():
            return tuple(plan.model.generate(prompt, past_key_values=cache, **options)[0, prompt.shape[1] :].tolist())

    expected, said = generate(DynamicCache()), generate(KVQ(KVQCacheConfig(**FIELDS), model=plan.model))
    assert (row.continuation.expected, row.continuation.said) == (expected, said)
    assert len({*expected, *said}) > 5
    assert expected != said
