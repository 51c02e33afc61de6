"""What `auto` means for rotation and balance: done to groups along tokens, where the core owns the storage."""

import pytest
import torch

from kvq import KVQ
from kvq.plugin_api.packed_format import get_packed_format
from kvq.store import balance


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    states = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))

    def restored():
        cache = KVQ(backend="native")
        cache.update(states, states, 0)
        return cache.materialize(0)

    expected, usual = restored(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = restored()
    finally:
        torch.set_default_dtype(usual)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert balance.FACTORS.numbers.dtype == torch.float32


@pytest.mark.parametrize("states_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16"])
def test_half_of_the_width_suffices_to_compute_in(states_dtype, compute_dtype):
    """Sums of 128 numbers leave float16 where the numbers do not."""
    states = (torch.randn(1, 1, 256, 128, generator=torch.Generator().manual_seed(0)) * 3000).to(states_dtype)
    cache = KVQ(backend="native", nbits_k=8, nbits_v=8, compute_dtype=compute_dtype, residual_length=0, sink_length=0)
    cache.update(states, states, 0)
    for found in cache.materialize(0):
        error = (found.float() - states.float()).norm() / states.float().norm()
        assert error < 0.01
