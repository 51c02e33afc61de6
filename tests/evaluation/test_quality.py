"""What is measured of a cache, against arithmetic in float64, DynamicCache and a forward over the whole text."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig
from kvq.evaluation.quality.candidates import Candidate, count_held_bytes, history_errors, list_peers, make_candidate
from kvq.evaluation.quality.forcing import force_tokens
from kvq.evaluation.quality.metrics import Estimate, Expected, TokenScores, bin_means
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.record import compare_kl
from kvq.evaluation.quality.run import evaluate
from kvq.evaluation.quality.text import TokenText

LENGTH = 400
NEVER_FULL = {"residual_length": 4096}
PLAIN = {"axis_value": "per_token", "rotation_k": "none", "rotation_v": "none", "balance_k": "none"}
EPSILON = torch.finfo(torch.float32).eps
PEER_LIBRARIES = pytest.mark.parametrize("library", ["hqq", pytest.param("quanto", marks=pytest.mark.costly)])
"""Of transformers' quantized caches; that of quanto compiles an extension at its first step."""


def rounding_bound(config):
    """Return what rounding in float32 can do to a model's states, relative to their size, on any machine.

    A sum of n products is off by at most n times epsilon, whatever the order in which a processor adds them; each
    layer's states depend on the sums of the layers before it. What is really found is about a hundredth of it.
    """
    return config.hidden_size * config.num_hidden_layers * EPSILON


def test_scores_are_those_of_float64():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 2, 3, 50, generator=generator) * 4
    targets = torch.randint(50, (2, 3), generator=generator)
    scores = TokenScores.compare(logits, Expected.of_logits(reference, targets))

    def softmax(numbers):
        powers = np.exp(numbers - numbers.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    p, q = softmax(reference.double().numpy()), softmax(logits.double().numpy())
    # A log-probability near zero is the difference of two numbers as large as the logits, each rounded.
    near = {"rtol": 1e-5, "atol": 4 * EPSILON * float(max(logits.abs().max(), reference.abs().max()))}
    assert np.allclose(scores.kl, (p * np.log(p / q)).sum(-1), **near)
    pick = targets.numpy()[..., None]
    assert np.allclose(scores.nll, -np.log(np.take_along_axis(q, pick, -1))[..., 0], **near)
    assert np.allclose(scores.reference_nll, -np.log(np.take_along_axis(p, pick, -1))[..., 0], **near)
    assert np.array_equal(scores.agreement, (p.argmax(-1) == q.argmax(-1)).astype(np.float32))
    other_way = (q * np.log(q / p)).sum(-1)
    assert not np.allclose(scores.kl, other_way, rtol=0.1)


@pytest.mark.parametrize(
    ("parts", "mean", "half_width"),
    [
        ([1.0, 2.0, 3.0], 2.0, 4.303 * 1 / math.sqrt(3)),
        ([0.0, 1.0], 0.5, 12.706 * math.sqrt(0.5) / math.sqrt(2)),
        ([float(number) for number in range(31)], 15.0, 2.042 * 9.0921 / math.sqrt(31)),
    ],
)
def test_an_interval_is_that_of_student(parts, mean, half_width):
    found = Estimate.of_parts(torch.tensor(parts))
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(half_width, rel=5e-3)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_one_part_has_no_interval():
    assert math.isnan(Estimate.of_parts(torch.tensor([3.0])).half_width)


def test_positions_are_averaged_in_runs():
    assert bin_means(torch.tensor([[1.0, 3, 5, 7], [3, 5, 7, 9]]), 2) == [3, 7]


@pytest.mark.parametrize("step", [1, 16])
def test_forced_steps_say_what_one_forward_says(loaded, text, step):
    model, tokens = loaded[0], text.sequences[:2]
    with torch.inference_mode():
        whole = model(tokens).logits[:, 127:-1]
    forced = torch.cat(list(force_tokens(model, tokens, DynamicCache(), prefill=128, step=step)), dim=1)
    assert forced.shape == whole.shape
    assert len(whole.argmax(-1).unique()) >= 8
    assert (forced - whole).abs().max() < 1e-3 * whole.abs().max()


def test_a_cache_that_quantizes_nothing_costs_nothing(make_plan, loaded, text):
    record, eight = evaluate(make_plan({"exact": NEVER_FULL, "eight": {"nbits_k": 8, "nbits_v": 8}}))
    bound = rounding_bound(loaded[0].config)
    assert max(record.error_by_distance) < bound
    assert max(eight.error_by_distance) > 10 * bound  # eight bits are seen
    assert record.top1 == 1
    with torch.inference_mode():
        logits = loaded[0](text.sequences).logits[:, 127:-1].double()
    # Log-probabilities are off by what the logits are, and rounded themselves.
    near = (bound + 4 * EPSILON) * float(logits.abs().max())
    assert record.kl.mean < near
    assert abs(record.ppl_change) < near
    likely = logits.log_softmax(-1).gather(-1, text.sequences[:, 128:, None])[..., 0]
    assert record.reference_perplexity == pytest.approx(math.exp(-likely[:, text.scored[128:]].mean()), rel=1e-4)


def test_bits_are_seen(make_plan):
    fields = {bits: {"nbits_k": bits, "nbits_v": bits, **PLAIN} for bits in (8, 4, 2)}
    exact, eight, four, two = evaluate(make_plan({"exact": NEVER_FULL, **{f"{b}": fields[b] for b in fields}}))
    assert exact.kl.mean < eight.kl.mean < four.kl.mean < two.kl.mean
    assert exact.held_bytes > eight.held_bytes > four.held_bytes > two.held_bytes
    assert exact.compression == pytest.approx(1, rel=0.2)  # the window grows by steps
    assert 32 * eight.held_bytes / eight.full_precision_bytes == eight.effective_bits
    assert compare_kl(two, four).low > 0


def test_errors_are_those_of_the_states_that_attention_reads(loaded, text):
    tokens = text.sequences[:2]
    cache, reference = KVQ(model=loaded[0], residual_length=50, nbits_v=4), DynamicCache()
    with torch.inference_mode():
        for held in (cache, reference):
            loaded[0](tokens, past_key_values=held)
    found = history_errors(cache, reference, 4)
    wrong, total = np.zeros(4), np.zeros(4)
    for index, layer in enumerate(reference.layers):
        for ours, theirs in zip(cache.materialize(index), (layer.keys, layer.values), strict=True):
            difference, states = (ours - theirs).double().numpy(), theirs.double().numpy()
            for place in range(4):  # 400 tokens: runs of 100, the first one behind position 300
                run = slice(400 - 100 * (place + 1), 400 - 100 * place)
                wrong[place] += (difference[:, :, run] ** 2).sum()
                total[place] += (states[:, :, run] ** 2).sum()
    assert found == pytest.approx(list(np.sqrt(wrong / total)), rel=1e-4)
    assert 0 < found[0] < found[1]  # half of the nearest run is in the window


def test_held_bytes_are_those_of_the_report(make_plan, loaded, text):
    (record,) = evaluate(make_plan({"defaults": {}}, batch_size=5))
    cache = KVQ(model=loaded[0])
    list(force_tokens(loaded[0], text.sequences, cache, prefill=128, step=16))
    assert record.held_bytes == cache.memory().total_bytes / 5
    assert (record.bits_key, record.bits_value) == (
        cache.memory().effective_bits_key,
        cache.memory().effective_bits_value,
    )


def test_the_batch_size_changes_nothing_but_the_grouping(make_plan):
    labelled = {"defaults": {}}
    (one,), (other,) = (evaluate(make_plan(labelled, batch_size=size)) for size in (1, 5))
    assert one.kl_by_sequence == pytest.approx(other.kl_by_sequence, rel=1e-2)
    assert one.needle_by_depth == other.needle_by_depth == {}


@PEER_LIBRARIES
def test_peers_are_measured_or_told_of(make_plan, loaded, text, library):
    # Before 5.18 a window of transformers' counts an update as one token: after nine of 16 both ways are nearly empty.
    plan = make_plan({"ours": {"nbits_v": 4}}, prefill=LENGTH - 9 * 16)
    unbuildable = Candidate("no such peer", lambda model: {}["x"], {"x": 1}, is_peer=True)
    peers = [peer for peer in list_peers() if library in peer.label]
    plan = type(plan)(**{**plan.__dict__, "candidates": [*plan.candidates, *peers, unbuildable]})
    records = {record.label: record for record in evaluate(plan)}
    assert records["no such peer"].failure == "KeyError: 'x'"
    assert math.isnan(records["no such peer"].kl.mean)
    four, two = records[f"transformers {library} 4"], records[f"transformers {library} 2"]
    if two.failure:  # hqq's cache of 5.17 packs 2 bits of some lengths wrongly
        assert (library, os.environ.get("KVQ_VERSIONS")) == ("hqq", "oldest")
        assert two.failure.startswith("RuntimeError: The size of tensor")
    assert 0 < four.kl.mean < (math.inf if two.failure else two.kl.mean)
    assert 32 / 8 < four.compression < 32 / 4.5
    assert four.error_by_distance is None


@PEER_LIBRARIES
def test_bytes_of_a_peer_are_all_its_tensors(loaded, text, library):
    peer = next(peer for peer in list_peers() if peer.label == f"transformers {library} 4")
    cache = peer.build(loaded[0])
    list(force_tokens(loaded[0], text.sequences[:1], cache, prefill=128, step=16))
    heads, dim, layers = 2, 64, 3
    stored = layers * 2 * heads * dim * LENGTH
    # 4 bits a code, scale and shift of 4 bytes each for 64 elements; what is not quantized yet has 4 bytes.
    least, most = stored * (4 / 8 + 8 / 64), stored * (4 / 8 + 8 / 64) + layers * 2 * heads * dim * 128 * 4
    assert least * 0.9 < count_held_bytes(cache) < most


@pytest.mark.parametrize("kind", ["sliding", "linear attention"])
def test_layers_that_forget_are_compared_as_far_as_they_go(kind):
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    shape |= dict(num_hidden_layers=2, vocab_size=99, initializer_range=0.2)
    if kind == "sliding":
        config = transformers.MistralConfig(sliding_window=64, **shape)
    else:
        linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
        linear |= {f"linear_{name}_head_dim": 16 for name in ("key", "value")}
        layers = ["linear_attention", "full_attention"]
        experts = dict(
            num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32
        )
        config = transformers.Qwen3NextConfig(layer_types=layers, **linear, **experts, **shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(99, (2, 200), generator=torch.Generator().manual_seed(0))
    text = TokenText("random", tokens, torch.ones(200, dtype=torch.bool))
    candidates = [make_candidate("two", KVQCacheConfig(nbits_v=2, residual_length=16))]
    (record,) = evaluate(EvaluationPlan(model, text, candidates, None, prefill=100, step=20))
    assert not record.failure
    bound = rounding_bound(config)
    errors = record.error_by_distance
    assert max(errors) < 1  # states of other tokens would be further off than that
    if kind == "linear attention":
        assert errors[0] < bound < errors[-1] / 100  # the newest are exact, the oldest are read back from 2 bits
        return
    # 63 tokens are in sight, in runs of 8. None of them is quantized: the store has left the window. But the second
    # layer's states come from attention that did read it, except for the oldest ones, which were computed before the
    # store came into their sight, and the newest, which were after it had left.
    assert max(errors[0], *errors[5:]) < bound
    assert min(errors[1:5]) > 100 * bound
