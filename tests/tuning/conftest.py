"""What the tests of tuning share: a small random model whose layers differ, and random texts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQCacheConfig
from kvq.evaluation.quality.text import TokenText

LAYERS = 4
LENGTH = 164


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
