"""Checks on the embedded model: it answers from a cache of the backend, and attention reads the packed form."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvq.attaching.attachment import attach
from kvq.attention.hint import without_hint
from kvq.cache.kvq import KVQ
from kvq.errors import CheckNotApplicableError
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import ANSWER_LENGTH, RecallBatch, sample_recall_batch
from kvq.evaluation.scoring import RecallScore, score_config, score_recall
from kvq.layers.savings import effective_bits
from kvq.testing.attention import measure_attention
from kvq.testing.case import HEAD_DIM, ContractCase, encode_blocks, quantized_layer, require
from kvq.transformers_seams.private_names import pass_cache

CONTEXTS, RECORDS, QUESTIONS = 2, 60, 4
LEAST_AGREEMENT = ((4.0, 0.95), (3.0, 0.85), (2.0, 0.6))
"""For a number of bits or more, the least share of tokens that equal full precision; fewer bits promise nothing."""
LEAST_DISTINCT = 8
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By how much two orders of summation may differ, as a share of the range of the logits."""
SCORE_TOLERANCE = 2e-2
FORCED_STEPS = 24


def check_generation(case: ContractCase) -> None:
    """The embedded model generates from a cache of the backend, and agrees with full precision as its bits allow."""
    with _without_words_on_the_model():
        _check_generation(case)


def _check_generation(case: ContractCase) -> None:
    model, batch, reference = _prepare(case)
    config = case.config()
    score = score_config(model, batch, config, reference)
    memory = score.memory
    require(memory is not None and memory.packed_bytes, "nothing was stored while the model answered")
    least = next((share for bits, share in LEAST_AGREEMENT if case.nbits >= bits), 0.0)
    shown = f"{score.agreement:.1%} of the tokens are those of full precision"
    require(score.agreement >= least, f"{shown}; at {case.nbits:g} bits at least {least:.0%} are expected")
    prompt = torch.cat([batch.context, batch.questions[:, 0, :2]], dim=1)
    texts = [_generate(model, config, prompt) for _ in range(2)]
    require(torch.equal(texts[0], texts[1]), "the same prompt gives another text the second time")
    said, expected = texts[0][:, prompt.shape[1] :][:, :ANSWER_LENGTH], reference.predictions[:, 0, :ANSWER_LENGTH]
    agreement = float((said == expected).float().mean())
    require(agreement >= least, f"generate agrees with full precision on {agreement:.1%} of an answer's tokens")


def check_fused_attention(case: ContractCase) -> None:
    """Attention on the packed form agrees with that on materialized states, also with padding and reordered rows."""
    for way, wrong in measure_attention(case):
        tolerance = LOGIT_TOLERANCE[case.dtypes[0]]
        require(wrong <= tolerance, f"{way}: off by {wrong:.3g} of the largest output; {tolerance:g} is rounding")
    with _without_words_on_the_model():
        _check_model_attention(case)


def _check_model_attention(case: ContractCase) -> None:
    model, batch, _ = _prepare(case)
    tokens = torch.cat([batch.context, *batch.questions.unbind(1)], dim=1)
    config = case.config()
    with attach(model, config):
        fused = _forced_logits(model, tokens, KVQ(config, model=model))
    with without_hint():  # the model's own attention, on purpose
        plain = _forced_logits(model, tokens, KVQ(config, model=model))
    difference = float((fused - plain).abs().max() / (plain.max() - plain.min()))
    tolerance = LOGIT_TOLERANCE[model.dtype]
    require(difference <= tolerance, f"logits differ by {difference:.3g} of their range; {tolerance:g} is rounding")


def check_fused_scores(case: ContractCase) -> None:
    """A quantizer that computes on its packed form gives the scores and mixes of the states that it decodes to."""
    for side in ("key", "value"):
        quantizer: Any = case.quantizer("key" if side == "key" else "value")
        if not all(hasattr(quantizer, name) for name in ("prepare_query", "scores", "mix", "finish_output")):
            raise CheckNotApplicableError("the quantizer leaves attention to the core")
        states = case.states(4 * quantizer.block_length)
        parts = encode_blocks(quantizer, states)
        restored = torch.empty_like(states)
        quantizer.decode_into(parts, restored)
        query = case.states(3, heads=2 * states.shape[1], seed=9)
        repeated = restored.double().repeat_interleave(2, dim=1)
        expected = query.double() @ repeated.transpose(-1, -2)
        if side == "key":
            found = quantizer.scores(quantizer.prepare_query(query), parts)
        else:
            weights = expected.softmax(-1).to(query)
            expected = weights.double() @ repeated
            found = quantizer.finish_output(quantizer.mix(weights, parts))
        wrong = float((found.double() - expected).abs().max() / expected.abs().max())
        require(wrong <= SCORE_TOLERANCE, f"computed on the packed {side}s: off by {wrong:.3g} of the largest result")


@contextlib.contextmanager
def _without_words_on_the_model() -> Iterator[None]:
    """Leave out kvq's word on the biased keys of the embedded model: the kit chose it, not the author of a backend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the keys of layers ")
        yield


def _prepare(case: ContractCase) -> tuple[PreTrainedModel, RecallBatch, RecallScore]:
    if case.device.type != "cpu":
        model, batch, reference = _load(case.dtypes[0])
        return model.to(case.device), batch, reference
    return _load(case.dtypes[0])


@lru_cache(maxsize=2)
def _load(dtype: torch.dtype) -> tuple[PreTrainedModel, RecallBatch, RecallScore]:
    """Return the embedded model, questions, and the answers of full precision, which must be varied enough."""
    model, _ = load_embedded_model(dtype)
    batch = sample_recall_batch(CONTEXTS, RECORDS, QUESTIONS, generator=torch.Generator().manual_seed(11))
    reference = score_recall(model, batch, DynamicCache(config=model.config))
    distinct = len(set(reference.predictions.flatten().tolist()))
    require(distinct >= LEAST_DISTINCT, f"the reference has {distinct} distinct tokens and would prove nothing")
    return model, batch, reference


def _generate(model: PreTrainedModel, config: Any, prompt: torch.Tensor) -> torch.Tensor:
    with attach(model, config) as attachment:
        text: torch.Tensor = model.generate(prompt, max_new_tokens=ANSWER_LENGTH + 1, do_sample=False)
    require(attachment.cache is not None, "generate made no cache")
    return text


@torch.inference_mode()
def _forced_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: KVQ) -> torch.Tensor:
    """Return the logits of the last tokens, each from a forward of its own; float32 `[B, steps, vocabulary]`."""
    prompt = tokens.shape[1] - FORCED_STEPS
    model(tokens[:, :prompt], logits_to_keep=1, **pass_cache(model, cache))
    steps = [model(token, **pass_cache(model, cache)).logits for token in tokens[:, prompt:].split(1, dim=1)]
    bits = effective_bits(quantized_layer(cache).side("key").codec, HEAD_DIM)
    require(bits > 0 and cache.memory().packed_bytes, "nothing is stored")
    return torch.cat(steps, dim=1).float()
