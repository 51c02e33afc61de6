"""Eight bits through a thousand teacher-forced steps: next to nothing changes, and one bit fewer is noticed."""

import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ

STEPS = 1000
EIGHT = dict(nbits_k=8, nbits_v=8, residual_length=32, sliding="quantize")


@pytest.fixture
def text():
    return torch.randint(2, 199, (1, 20 + STEPS), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def follow(forced, compare, text, assert_telling):
    """Largest difference of logits and top-1 agreement of a configuration over all steps."""

    def measure(model, **config):
        options = dict(prompt=20, chunk=20)
        reference = forced(model, text, DynamicCache(config=model.config), **options)
        assert reference.shape[1] == STEPS
        assert_telling(reference.argmax(-1))
        cache = KVQ(model=model, **config)
        logits = forced(model, text, cache, **options)
        assert all(side.store.length > 900 for layer in cache.layers for _, side in layer.sides())
        return compare(logits, reference)

    return measure


def test_as_transformers_initializes_it(family, build, follow):
    difference, agreement = follow(build(family, std=None), backend="native", **EIGHT)
    assert difference < 0.02
    assert agreement >= 0.99


@pytest.mark.parametrize("backend", ["quanto", "hqq", "native"])
def test_with_sharp_attention(backend, build, follow):
    difference, agreement = follow(build("llama", std=0.15), backend=backend, **EIGHT)
    assert difference < 0.02
    assert agreement >= 0.99


def test_one_bit_fewer_is_noticed(build, follow):
    _, agreement = follow(build("llama", std=0.15), backend="native", **{**EIGHT, "nbits_k": 7, "nbits_v": 7})
    assert agreement < 0.99
