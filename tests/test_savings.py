"""Settings that save nothing, seldom, or only after a long time."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvq import KVQ, user_warnings
from kvq.cli import main
from kvq.errors import ConfigError
from kvq.planning import plan

SMALL = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=99)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(user_warnings, "_told", set())


def fill(tokens, dtype=torch.bfloat16, **fields):
    """Return a cache that was given tokens by the hundred, and the bytes of its keys and values in plain tensors."""
    cache = KVQ(**fields)
    states = torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.update(states[:, :, :1], states[:, :, :1], 0)
    for start in range(1, tokens, 100):
        piece = states[:, :, : min(100, tokens - start)]
        cache.layers[0].update(piece, piece, packed=True)
    return cache, 2 * 2 * tokens * 64 * dtype.itemsize


@pytest.mark.parametrize("tokens", [1, 700, 3000])
@pytest.mark.case(
    "q_group_size=65536 with per-channel groups",
    "at every length at most 512 tokens more than full precision; a warning says that the first 65,568 wait",
)
def test_long_groups_hold_no_more_than_their_tokens(tokens):
    with pytest.warns(UserWarning, match=r"keys are quantized in blocks of 65,536 tokens \(4.1 eff.*until 65,568 are"):
        cache, plain = fill(tokens, q_group_size=65536)
    assert cache.memory().total_bytes <= plain + 2 * 2 * 512 * 64 * 2
    assert cache.layers[0].side("key").store.length == 0


def test_it_is_told_once_and_by_groups_along_tokens_only(recwarn):
    for _ in range(2):
        fill(100, axis_value="per_token", q_group_size=65536)
    assert len([one for one in recwarn if "blocks of 65,536" in str(one.message)]) == 1
    cache, _ = fill(300, axis_value="per_token", q_group_size={"key": 64, "value": 65536})
    assert cache.layers[0].side("value").codec.spec.group_length == 64, "groups inside a token end with the head"


def test_long_groups_are_quantized_in_the_end():
    with pytest.warns(UserWarning, match="blocks of 4,096 tokens"):
        cache, plain = fill(9000, q_group_size=4096, residual_length=0)
    assert cache.layers[0].side("key").store.length == 8192
    assert cache.memory().total_bytes < 0.5 * plain


@pytest.mark.parametrize(
    ("fields", "dtype", "words"),
    [
        (dict(axis_key="per_token", q_group_size={"key": 8, "value": 64}, nbits_k=8), torch.bfloat16, "keys"),
        (
            dict(axis_value="per_token", q_group_size={"key": 64, "value": 8}, nbits_v=8, nbits_k=8),
            torch.float16,
            "values",
        ),
        (dict(axis_key="per_token", q_group_size={"key": 8, "value": 64}, nbits_k=8), torch.float32, None),
        ({}, torch.bfloat16, None),
        (dict(nbits_k=8, nbits_v=8, q_group_size=16), torch.bfloat16, None),
    ],
)
@pytest.mark.case(
    "metadata of small groups, with the room that chunks keep, past the bits of the states",
    "a warning with the effective bits at the first update; refused where no length saves anything",
)
def test_metadata_and_room_past_the_states(fields, dtype, words, recwarn):
    fill(300, dtype=dtype, **fields)
    told = [str(one.message) for one in recwarn if "effective bits" in str(one.message)]
    assert bool(told) is (words is not None), told
    if words:
        (text,) = told
        assert f"8 gives 14.0 effective bits for the {words}" in text, "8 of the code, 48 of scale and mid over 8"
        assert "up to 17.5 with the room" in text


def test_what_can_never_save_anything_is_refused():
    with pytest.raises(ConfigError, match=r"effective bits for the keys.*no less than full precision"):
        fill(3, axis_key="per_token", axis_value="per_token", q_group_size=4, nbits_k=8, nbits_v=8)


@pytest.mark.parametrize("command", ["check", "plan"])
def test_the_commands_say_so(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.yaml").write_text("q_group_size: 65536\n")
    transformers.LlamaConfig(**SMALL, num_key_value_heads=1).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "long.yaml")]
    if command == "plan":
        arguments = ["--config", *arguments, "--model", str(tmp_path / "model"), "--context", "2000"]
    monkeypatch.setattr("sys.argv", ["kvq", command, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code in (None, 0)
    assert "warning: q_group_size: the keys are quantized in blocks of 65,536 tokens" in printed.err
    if command == "plan":
        assert "warning: at 2,000 tokens the quantized layers hold" in printed.out


def test_a_plan_of_long_blocks_takes_no_longer_than_others(recwarn):
    made = plan(transformers.LlamaConfig(**SMALL), {"q_group_size": 65536}, context=2000)
    assert made.horizon == 512
    assert made.total_bytes >= made.full_precision_bytes
    later = plan(transformers.LlamaConfig(**SMALL), {"q_group_size": 65536}, context=200_000)
    assert later.total_bytes < later.full_precision_bytes
