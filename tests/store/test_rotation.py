import numpy as np
import pytest
import torch

from kvq.store.rotation import HadamardRotation


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (80, 16), (96, 32), (67, 1), (128, 128)])
def test_rotation_is_the_signed_block_diagonal_hadamard_matrix(head_dim, block):
    rotation = HadamardRotation(head_dim, seed=3, device=torch.device("cpu"))
    states = torch.randn(2, 5, head_dim)
    expected = states.double().numpy() * rotation.signs.numpy() @ np.kron(np.eye(head_dim // block), hadamard(block))
    torch.testing.assert_close(rotation.apply(states).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.undo(rotation.apply(states)), states, atol=1e-5, rtol=0)
    assert torch.equal(rotation.undo(states.mT, -2).mT, rotation.undo(states)), "bit for bit, wherever heads run"


@pytest.mark.parametrize("head_dim", [64, 80, 67])
def test_signs_that_were_kept_give_the_rotation_again(head_dim):
    rotation = HadamardRotation(head_dim, seed=3, device=torch.device("cpu"))
    again = HadamardRotation.of_signs(rotation.signs)
    states = torch.randn(2, 5, head_dim)
    assert torch.equal(again.apply(states), rotation.apply(states))
    assert torch.equal(again.undo(states), rotation.undo(states))
    assert again.signs is rotation.signs


def test_signs_depend_on_the_seed_alone():
    signs = [HadamardRotation(64, seed, torch.device("cpu")).signs for seed in (0, 0, 1)]
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])
    assert set(signs[0].tolist()) == {-1, 1}


def test_an_outlier_is_spread_over_its_block():
    states = torch.zeros(1, 64)
    states[0, 7] = 8.0
    rotated = HadamardRotation(64, 0, torch.device("cpu")).apply(states)
    torch.testing.assert_close(rotated.abs(), torch.ones(1, 64))


def test_gradients_pass_and_change_no_bit():
    rotation = HadamardRotation(64, 0, torch.device("cpu"))
    states = torch.randn(3, 64, requires_grad=True)
    rotated, weights = rotation.apply(states), torch.randn(3, 64)
    (rotated * weights).sum().backward()
    assert torch.equal(rotated.detach(), rotation.apply(states.detach()))
    torch.testing.assert_close(states.grad, rotation.undo(weights), atol=1e-5, rtol=0)
