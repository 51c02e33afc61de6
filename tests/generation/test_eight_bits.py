"""Eight bits through a thousand teacher-forced predictions: next to nothing changes, and one bit fewer is noticed."""

import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ

LENGTH = 1020
"""Tokens of a text."""
SIDE_BY_SIDE = dict(rows=4, prompt=770, chunk=110, step=5)
"""Four texts of 250 predictions each, all of them late, five at once: a twentieth of the steps of one text."""
STEP_BY_STEP = dict(rows=1, prompt=20, chunk=20, step=1)
EIGHT = dict(nbits_k=8, nbits_v=8, residual_length=32, sliding="quantize")


@pytest.fixture(scope="module")
def references():
    """Models, their texts and their logits in full precision, as tests come to need them."""
    return {}


@pytest.fixture
def follow(references, build, forced, compare, assert_telling):
    """Largest difference of logits and top-1 agreement of a configuration over a thousand predictions."""

    def build_reference(family, std, rows, **options):
        model = build(family, std=std)
        text = torch.randint(2, 199, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
        logits = forced(model, text, DynamicCache(config=model.config), **options)
        assert logits.shape[:2].numel() == 1000
        assert_telling(logits.argmax(-1))
        return model, text, logits

    def measure(family, std, pace=SIDE_BY_SIDE, **config):
        wanted = family, std, pace["rows"]
        if wanted not in references:
            references[wanted] = build_reference(family, std, **pace)
        model, text, reference = references[wanted]
        cache = KVQ(model=model, **config)
        logits = forced(model, text, cache, **{name: size for name, size in pace.items() if name != "rows"})
        stored = [
            (side.contents.dropped + side.store.length, layer) for layer in cache.layers for _, side in layer.sides()
        ]
        assert all(length > 900 - layer.flush_delay for length, layer in stored)
        return compare(logits, reference)

    return measure


def test_as_transformers_initializes_it(family, follow):
    difference, agreement = follow(family, None, backend="native", **EIGHT)
    assert difference < 0.02
    assert agreement >= 0.99


@pytest.mark.parametrize("backend", ["quanto", "hqq", "native"])
def test_with_sharp_attention(backend, follow):
    pace = STEP_BY_STEP if backend == "native" else SIDE_BY_SIDE
    difference, agreement = follow("llama", 0.15, pace, backend=backend, **EIGHT)
    assert difference < 0.02
    assert agreement >= 0.99


def test_one_bit_fewer_is_noticed(follow):
    _, agreement = follow("llama", 0.15, backend="native", **{**EIGHT, "nbits_k": 7, "nbits_v": 7})
    assert agreement < 0.99
