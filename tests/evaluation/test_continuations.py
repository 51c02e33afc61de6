"""Log-likelihoods behind a cache: the numbers of one plain forward where nothing is lost, whatever the padding."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from kvq import KVQ, KVQCacheConfig
from kvq.evaluation.continuations import plan_readings, score_readings
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import sample_recall_batch

TOLERANCE = 1e-4  # nats, over a whole continuation, in float32

EXACT = KVQCacheConfig(residual_length=4096)
MANY_BITS = KVQCacheConfig(nbits_k=8, nbits_v=8, residual_length=16, sink_length=0, q_group_size=16)
FEW_BITS = KVQCacheConfig(
    nbits_k=2, nbits_v=2, residual_length=16, sink_length=0, q_group_size=16, rotation_k="none", rotation_v="none"
)


@pytest.fixture(scope="module")
def model():
    return load_embedded_model(torch.float32)[0]


def draw_requests(*lengths: tuple[int, int]) -> list[tuple[list[int], list[int]]]:
    """Contexts of records and continuations of the lengths given; a continuation is what the records say next."""
    text = sample_recall_batch(1, 100, 1, generator=torch.Generator().manual_seed(0)).context[0].tolist()
    return [(text[:context], text[context : context + count]) for context, count in lengths]


def score_plainly(model, context, continuation) -> tuple[float, bool]:
    """The definition: one forward over everything, no cache, no padding."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0]
    scored = logits[len(context) - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    return scored.gather(-1, targets[:, None]).sum().item(), bool((scored.argmax(-1) == targets).all())


def score(model, requests, build, **options):
    found = dict(score_readings(model, plan_readings(requests, 2048), build, **options))
    return [found[place] for place in range(len(requests))]


def build_kvq(model, config):
    return lambda padding: KVQ(config, model=model, padding=padding if any(padding) else None)


RAGGED = draw_requests((1, 9), (40, 1), (300, 30), (299, 3), (2, 1), (120, 64))


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("cache", ["kvq", "dynamic"])
def test_where_all_is_exact_the_numbers_are_those_of_one_forward(model, cache, step):
    build = build_kvq(model, EXACT) if cache == "kvq" else lambda padding: DynamicCache(config=model.config)
    for request, found in zip(RAGGED, score(model, RAGGED, build, step=step), strict=True):
        likelihood, is_greedy = score_plainly(model, *request)
        assert found.log_likelihood == pytest.approx(likelihood, abs=TOLERANCE)
        assert found.is_greedy == is_greedy


def test_few_bits_show_and_padding_to_the_right_does_not(model):
    requests = draw_requests((300, 30), (300, 3), (300, 64))
    together = score(model, requests, build_kvq(model, FEW_BITS))
    for request, found in zip(requests, together, strict=True):
        (alone,) = score(model, [request], build_kvq(model, FEW_BITS))
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, abs=TOLERANCE)
        assert abs(found.log_likelihood - score_plainly(model, *request)[0]) > 100 * TOLERANCE


def test_padding_on_both_sides_costs_no_more_than_rounding(model):
    requests = draw_requests((1, 200), (300, 200), (120, 64), (450, 5))
    for request, found in zip(requests, score(model, requests, build_kvq(model, MANY_BITS)), strict=True):
        assert found.log_likelihood == pytest.approx(score_plainly(model, *request)[0], rel=2e-3)


def test_a_continuation_of_one_token_reads_the_quantized_history_too(model):
    (found,) = score(model, draw_requests((400, 1)), build_kvq(model, FEW_BITS))
    assert abs(found.log_likelihood - score_plainly(model, *draw_requests((400, 1))[0])[0]) > 100 * TOLERANCE


def test_the_context_is_read_at_once_and_the_rest_step_by_step(model):
    lengths = []
    handle = model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    score(model, draw_requests((40, 5), (30, 2)), build_kvq(model, EXACT), step=2)
    handle.remove()
    assert lengths == [39, 2, 2, 1]


def test_choices_that_differ_in_the_last_token_are_read_once(model):
    context, (first, second, *others) = draw_requests((50, 4))[0]
    requests = [(context, [first, second]), (context, [first, others[0]]), (context, [second]), (context, [first])]
    readings = plan_readings(requests, 2048)
    assert sorted(sorted(reading.endings) for reading in readings) == [[0, 1], [2, 3]]
    for request, found in zip(requests, score(model, requests, build_kvq(model, EXACT)), strict=True):
        assert found.log_likelihood == pytest.approx(score_plainly(model, *request)[0], abs=TOLERANCE)


def test_equal_requests_each_get_their_score(model):
    request = draw_requests((50, 4))[0]
    first, second = score(model, [request, request], build_kvq(model, EXACT))
    assert first == second


def test_of_a_long_text_the_beginning_is_left_out():
    (reading,) = plan_readings([(range(100), [100, 101])], max_length=10)
    assert (reading.prompt, reading.steps, reading.endings) == (tuple(range(91, 99)), (99, 100), {0: 101})


def test_learned_positions_do_not_run_over_at_the_right_padding():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=491, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    requests = draw_requests((47, 1), (2, 46), (20, 20))
    for request, found in zip(requests, score(model, requests, build_kvq(model, EXACT)), strict=True):
        assert found.log_likelihood == pytest.approx(score_plainly(model, *request)[0], abs=TOLERANCE)
