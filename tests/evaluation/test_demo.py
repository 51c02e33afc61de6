"""The demo's scores are those of generation, and its comparisons are arithmetic on them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig
from kvq.evaluation.demo import Comparison, DemoCase, DemoRow, compare_bits, run_cases
from kvq.evaluation.one_thread import one_thread
from kvq.evaluation.recall import ANSWER_LENGTH, sample_recall_batch
from kvq.evaluation.scoring import RecallScore, score_recall
from kvq.testing.case import PLAIN
from kvq.transformers_seams.private_names import pass_cache

TWO_BITS = {**PLAIN, "nbits_k": 2, "nbits_v": 4, "backend": "native"}


@pytest.fixture(scope="module")
def batch():
    return sample_recall_batch(3, 80, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:.*nbits_k.*below.*")
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("fields", [None, TWO_BITS], ids=["full precision", "two bits"])
def test_an_answer_is_exact_where_generate_says_it(loaded, batch, fields, at_once):
    model = loaded[0]

    def build():
        return DynamicCache(config=model.config) if fields is None else KVQ(KVQCacheConfig(**fields), model=model)

    generated = []
    for row in range(3):
        for question in range(4):
            # Every question behind the context and the questions before it, answered, as the scores have it.
            before = batch.questions[row, :question].flatten()
            prompt = torch.cat([batch.context[row], before, batch.questions[row, question, :2]])[None]
            cache = build()
            with torch.inference_mode():
                model(batch.context[row][None], **pass_cache(model, cache))
                options = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, **pass_cache(model, cache)}
                text = model.generate(prompt, **options)
            generated.append(torch.equal(text[0, -ANSWER_LENGTH:], batch.answers[row, question]))
    score = score_recall(model, batch, build(), at_once=at_once)
    assert len(score.predictions.unique()) >= 8
    assert score.exact.flatten().tolist() == generated
    assert all(generated) == (fields is None)  # 2 bits for the keys cost answers, or nothing would be shown


def test_full_precision_comes_first_and_others_are_compared_with_it(loaded, batch):
    exact = KVQCacheConfig(backend="native", residual_length=4096)
    cases = [DemoCase("full precision"), DemoCase("native", exact)]
    plain, row = run_cases(loaded[0], batch, cases)
    assert (plain.score.agreement, row.score.agreement) == (1.0, 1.0)
    assert torch.equal(plain.score.predictions, row.score.predictions)
    # 3 contexts, 3 layers, keys and values, 2 heads of 64 numbers of 4 bytes
    tokens = batch.context.shape[1] + batch.questions[0].numel()
    assert plain.score.held_bytes == 3 * 3 * 2 * 2 * 64 * 4 * tokens == row.score.memory.full_precision_bytes
    assert plain.score.memory is None


def make_row(backend, fields, exact):
    config = None if fields is None else KVQCacheConfig(backend=backend, **fields)
    exact = torch.tensor(exact, dtype=torch.bool)
    return DemoRow(DemoCase(backend, config), RecallScore(torch.zeros(1), exact, 1.0, 0))


@pytest.mark.filterwarnings("ignore:.*nbits_k.*below.*")
def test_a_comparison_is_a_mean_over_contexts_with_their_spread():
    rows = [
        make_row("full precision", None, [[1, 1], [1, 1]]),
        make_row("native", {"nbits_k": 4, "nbits_v": 2}, [[1, 1], [1, 0]]),
        make_row("native", {"nbits_k": 2, "nbits_v": 4}, [[1, 0], [0, 0]]),
        make_row("quanto", {"nbits_k": 4, "nbits_v": 2}, [[1, 1], [1, 1]]),
    ]
    (found,) = compare_bits(rows, "K4V2", "K2V4")  # by context 1 - 0.5 and 0.5 - 0; quanto has no K2V4
    assert (found.backend, found.difference.mean, found.difference.half_width) == ("native", 0.5, 0.0)
    assert str(found) == "+50.0 ± 0.0"
    native, quanto = compare_bits(rows, "K4V2", "16 bit")
    assert quanto.difference.mean == 0
    # 0 and -0.5: a standard deviation of 0.5 / sqrt(2), over sqrt(2), times Student's t for one degree of freedom
    assert native.difference.mean == -0.25
    assert native.difference.half_width == pytest.approx(12.706 * 0.25)
    assert compare_bits(rows, "K8V8", "16 bit") == []


def test_one_context_has_no_interval():
    rows = [
        make_row("full precision", None, [[1, 1]]),
        make_row("native", {"nbits_k": 4, "nbits_v": 4}, [[1, 0]]),
    ]
    (found,) = compare_bits(rows, "K4V4", "16 bit")
    assert isinstance(found, Comparison)
    assert math.isnan(found.difference.half_width)
    assert str(found) == "-50.0"


def test_threads_are_as_before_also_where_the_work_fails():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    @one_thread()
    def fail():
        seen.append(torch.get_num_threads())
        raise ArithmeticError

    try:
        with pytest.raises(ArithmeticError):
            fail()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
