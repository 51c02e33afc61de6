"""What the tests of tuning share: a small random model whose layers differ, and random texts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQCacheConfig
from kvq.evaluation.quality.text import TokenText
from kvq.tuning import Goal, Grid, SearchSpace, TuningPlan, group_layers

LAYERS = 4
LENGTH = 200


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, vocab_size=199, max_position_embeddings=512, initializer_range=0.2, **shape
    )
    return LlamaForCausalLM(config).eval()


def make_text(seed, sequences=2, length=LENGTH):
    tokens = torch.randint(199, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return TokenText(f"noise {seed}", tokens, torch.ones(length, dtype=torch.bool))


@pytest.fixture(scope="session")
def text():
    return make_text(1)


@pytest.fixture(scope="session")
def base():
    return KVQCacheConfig(backend="native", residual_length=16)


@pytest.fixture
def make_plan(model, text, base):
    """Return a function that plans tuning for a goal; keywords of layers and of the plan itself."""

    def make(goal, *, bits=(2, 4, 8), most_pairs=None, **options):
        layers = {name: options.pop(name) for name in ("together", "keep_first", "keep_last") if name in options}
        settings = tuple(Grid(bits=bits).settings())
        space = SearchSpace(settings, settings, *group_layers(range(LAYERS), **layers), most_pairs)
        sizes = {"prefill": 100, "step": 16, "tries": 0, **options}
        return TuningPlan(model, sizes.pop("text", text), make_text(2), space, goal, sizes.pop("base", base), **sizes)

    return make


@pytest.fixture
def budget():
    """A goal between the smallest and the largest candidates of the model."""
    return Goal(1000, bits=7.5)
