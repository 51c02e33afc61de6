"""The committed configurations for SmolLM2 load, keep the method they were measured with, and hold what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kvq import KVQCacheConfig
from kvq.planning import plan
from kvq.units import format_bytes

FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "tuned").glob("*.yaml"))
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*nbits_k.*is below.*nbits_v")
def test_a_committed_configuration_holds_the_bytes_that_its_comment_names(path):
    comment = path.read_text(encoding="utf-8").partition("version:")[0]
    words = " ".join(comment.replace("#", " ").split())
    config = KVQCacheConfig.from_file(path)
    planned = plan(SMOLLM2, config, context=4096, dtype=torch.float32)
    assert f"{format_bytes(planned.total_bytes)} at 4,096 tokens" in words
    assert f"{32 * planned.total_bytes / planned.full_precision_bytes:.2f} bits an element" in words
    assert "kvq tune --model smollm2 --budget" in words
    assert torch.int8 in {config.for_layer(index).key.metadata_dtype for index in range(30)}


def test_some_are_committed():
    assert len(FILES) >= 3
