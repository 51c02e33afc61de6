"""Sinks cost what is there of them, whatever number is configured."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvq import KVQ
from kvq.planning import plan

HEADS, DIM = 2, 16
HUGE = 1_000_000
SMALL = {"backend": "native", "q_group_size": 16, "residual_length": 16}


def draw(tokens, batch=2, seed=0):
    return torch.randn(2, batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def full_precision(tokens, batch=2):
    return 2 * batch * HEADS * tokens * DIM * 4


@pytest.mark.case("`sink_length=1000000`", "costs as much as the tokens that exist")
@pytest.mark.parametrize(
    "fields",
    [{"sink_length": HUGE}, {"residual_length": HUGE}, {"sink_length": HUGE, "residual_length": HUGE}],
    ids=str,
)
def test_huge_numbers_hold_little_more_than_the_tokens(fields):
    cache = KVQ(**{**SMALL, **fields})
    states = draw(600)
    for start in range(0, 600, 50):
        cache.update(*states[:, :, :, start : start + 50], 0)
    assert cache.memory().total_bytes <= 1.6 * full_precision(600)
    for found, expected in zip(cache.materialize(0), states, strict=True):
        assert torch.equal(found, expected), "all of them are sinks or in the window"


def test_huge_padding_holds_no_sinks():
    cache = KVQ(padding=[HUGE, 10**9], sink_length=HUGE, **SMALL)
    cache.update(*draw(300), 0)
    memory = cache.memory()
    assert memory.sink_bytes == 0
    assert memory.total_bytes <= full_precision(300)


def test_rows_get_their_sinks_as_they_come():
    cache = KVQ(padding=[0, 90], sink_length=70, **SMALL)
    states = draw(400)
    for start in range(0, 400, 40):
        cache.update(*states[:, :, :, start : start + 40], 0)
    for found, expected in zip(cache.materialize(0), states, strict=True):
        assert torch.equal(found[0, :, :70], expected[0, :, :70])
        assert torch.equal(found[1, :, 90:160], expected[1, :, 90:160])
    assert cache.memory().sink_bytes == full_precision(70)


@pytest.mark.parametrize(("tokens", "version"), [(300, 1), (100, 2)])
def test_what_is_there_of_them_is_saved(tokens, version, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = KVQ(sink_length=200, padding=[0, 30], **SMALL)
    states = draw(tokens + 300)
    cache.update(*states[:, :, :, :tokens], 0)
    cache.save(path)
    assert f'"format_version":"{version}"'.encode() in path.read_bytes()
    loaded = KVQ.load(path)
    for one in (cache, loaded):
        one.update(*states[:, :, :, tokens:], 0)
        one.crop(-200)
        one.update(*draw(100, seed=1), 0)
    for found, expected in zip(loaded.materialize(0), cache.materialize(0), strict=True):
        assert torch.equal(found, expected)


def test_a_plan_counts_what_will_be_there():
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=99, head_dim=DIM
    )
    for fields in ({"sink_length": HUGE}, {"residual_length": HUGE}):
        planned = plan(config, {**SMALL, **fields}, context=1000, dtype=torch.float32)
        assert planned.total_bytes <= 1.6 * planned.full_precision_bytes
        held = KVQ(model=config, **{**SMALL, **fields})
        for layer in range(2):
            held.update(*draw(1000, batch=1), layer)
        assert planned.total_bytes == held.memory().total_bytes
