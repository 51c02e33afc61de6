"""What the tests of tuning share: a small random model whose layers differ, and random texts."""

from __future__ import annotations

import pytest
import torch
from random_texts import LAYERS, make_text
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQCacheConfig


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, vocab_size=199, max_position_embeddings=512, initializer_range=0.2, **shape
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def text():
    return make_text(1)


@pytest.fixture(scope="session")
def base():
    return KVQCacheConfig(backend="native", residual_length=16)
