"""The argument `indices`, in which models with an indexer hand their choice of keys to an attention."""

from types import SimpleNamespace

import pytest
import torch

from kvq.attention.entry import kvq_attention_forward

QUERIES, KEYS = 3, 9


def attend_to(chosen, query, keys, values, seen):
    """Attend in float64 to the keys of each query that were chosen and are seen, one query at a time."""
    out = torch.zeros(1, QUERIES, 2, 4, dtype=torch.float64)
    for place in range(QUERIES):
        kept = [key for key in chosen[place] if key >= 0 and seen[place, key]]
        for head in range(2):
            scores = keys[0, head, kept].double() @ query[0, head, place].double() * 0.5
            out[0, place, head] = scores.softmax(0) @ values[0, head, kept].double()
    return out


MASKS = {
    "none": lambda seen: None,
    "boolean": lambda seen: seen[None, None],
    "additive": lambda seen: torch.zeros(1, 1, QUERIES, KEYS).masked_fill_(~seen, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("mask", MASKS)
def test_only_chosen_keys_are_attended_to(mask):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 2, length, 4) for length in (QUERIES, KEYS, KEYS))
    seen = torch.arange(KEYS) <= torch.arange(KEYS - QUERIES, KEYS)[:, None]
    chosen = [[0, 3, 6, -1], [2, 8, 7, 1], [8, -1, -1, 4]]  # the second holds a key of the future
    out, _ = kvq_attention_forward(
        SimpleNamespace(is_causal=True), query, keys, values, MASKS[mask](seen), scaling=0.5,
        indices=torch.tensor([chosen], dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), attend_to(chosen, query, keys, values, seen), rtol=1e-5, atol=1e-5)


def test_no_choice_is_plain_attention():
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 2, length, 4) for length in (QUERIES, KEYS, KEYS))
    module = SimpleNamespace(is_causal=True)
    plain, _ = kvq_attention_forward(module, query, keys, values, None, scaling=0.5)
    chosen, _ = kvq_attention_forward(module, query, keys, values, None, scaling=0.5, indices=None)
    assert torch.equal(plain, chosen)
