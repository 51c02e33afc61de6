"""What `auto` means for rotation and balance: done to groups along tokens, where the core owns the storage."""

import pytest
import torch

from kvq import KVQ
from kvq.plugin_api.packed_format import get_packed_format


def steps_of(head_dim=64, **fields):
    cache = KVQ(**fields)
    states = torch.randn(1, 1, 8, head_dim)
    cache.update(states, states, 0)
    packed = [get_packed_format(cache.layers[0].side(side).codec) for side in ("key", "value")]
    return [(one.rotation, one.balance) for one in packed]


@pytest.mark.parametrize("backend", ["native", "quanto", "hqq"])
def test_the_defaults_rotate_and_balance_both_sides(backend):
    assert steps_of(backend=backend) == [("hadamard", "rms")] * 2


def test_groups_inside_a_token_stay_as_they_are():
    """A shared offset of all channels would end in one channel, whose range its group then has."""
    assert steps_of(axis_value="per_token") == [("hadamard", "rms"), ("none", "none")]
    assert steps_of(axis_key="per_token", rotation_k="hadamard") == [("hadamard", "none"), ("hadamard", "rms")]
    states = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(0)) + 100
    errors = {}
    for rotation in ("auto", "none", "hadamard"):
        cache = KVQ(backend="native", nbits_k=4, axis_key="per_token", rotation_k=rotation, residual_length=0)
        cache.update(states, states, 0)
        errors[rotation] = (cache.materialize(0)[0] - states).square().mean().sqrt()
    assert errors["auto"] == errors["none"] < 0.1 < 10 * errors["none"] < errors["hadamard"]


@pytest.mark.parametrize(("head_dim", "rotation"), [(64, "hadamard"), (80, "hadamard"), (72, "none"), (67, "none")])
def test_a_transform_of_a_few_elements_is_left_out(head_dim, rotation):
    assert steps_of(head_dim) == [(rotation, "rms")] * 2
    assert steps_of(head_dim, rotation_k="hadamard")[0] == ("hadamard", "rms")


def test_none_is_none():
    plain = dict.fromkeys(("rotation_k", "rotation_v", "balance_k", "balance_v"), "none")
    assert steps_of(**plain) == [("none", "none")] * 2
