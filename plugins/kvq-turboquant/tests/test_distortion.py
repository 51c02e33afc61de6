"""Measured distortion beside the bounds and figures of arXiv 2504.19874, on vectors that no codebook was made from."""

import math

import pytest
import torch
from kvq_turboquant.codebook import find_levels, measure_distortion
from kvq_turboquant.vector_code import VectorCode

DIMENSION = 128
PAPER_MSE = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
PAPER_INNER_PRODUCT = {2: 0.56, 3: 0.18, 4: 0.047}
GAUSSIAN = {1: 0.36338, 2: 0.11748, 3: 0.03454, 4: 0.009497}
"""Of the Lloyd-Max quantizer of a normal number (Max 1960, table 1): the limit for long vectors."""


def code_of(nbits, *, inner_product=False):
    return VectorCode(DIMENSION, nbits, 32, torch.device("cpu"), inner_product=inner_product, seed=0)


@pytest.fixture(scope="module")
def vectors():
    """Sparse vectors as well as dense ones: the rotation makes them alike."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(256, 32, DIMENSION, generator=generator)
    return states * (torch.rand(states.shape, generator=generator) < 0.3) * 7


@pytest.mark.parametrize("nbits", PAPER_MSE)
def test_the_codebook_is_the_best_one(nbits):
    assert measure_distortion(100_000, find_levels(100_000, nbits)) == pytest.approx(GAUSSIAN[nbits], rel=3e-3)
    levels = find_levels(DIMENSION, nbits)
    best = measure_distortion(DIMENSION, levels)
    for index in range(len(levels)):
        for change in (-1e-2, 1e-2):
            moved = tuple(level + change * (place == index) for place, level in enumerate(levels))
            assert measure_distortion(DIMENSION, moved) > best


@pytest.mark.parametrize("nbits", PAPER_MSE)
def test_the_squared_error_is_the_paper_s(nbits, vectors):
    code = code_of(nbits)
    error = (code.decode(code.encode(vectors)) - vectors).square().sum(-1) / vectors.square().sum(-1)
    found = error.mean().item()
    assert 4.0**-nbits <= found <= math.sqrt(3) * math.pi / 2 * 4.0**-nbits
    assert found == pytest.approx(measure_distortion(DIMENSION, find_levels(DIMENSION, nbits)), rel=0.02)
    assert found == pytest.approx(PAPER_MSE[nbits], rel=0.15)


@pytest.mark.parametrize("nbits", PAPER_INNER_PRODUCT)
def test_dot_products_are_unbiased_and_as_exact_as_the_paper_s(nbits, vectors):
    query = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2)) + vectors / 4
    norms = query.square().sum(-1) * vectors.square().sum(-1)
    truth = (query * vectors).sum(-1)
    code = code_of(nbits, inner_product=True)
    found = (query * code.decode(code.encode(vectors))).sum(-1)
    distortion = ((found - truth).square() / norms).mean().item() * DIMENSION
    assert 4.0**-nbits <= distortion <= math.sqrt(3) * math.pi**2 * 4.0**-nbits
    assert distortion == pytest.approx(PAPER_INNER_PRODUCT[nbits], rel=0.2)
    slope = (found * truth).sum() / truth.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.01), "unbiased"
    plain = code_of(nbits)
    shrunk = (query * plain.decode(plain.encode(vectors))).sum(-1)
    assert ((shrunk * truth).sum() / truth.square().sum()).item() < 1 - 0.8 * PAPER_MSE[nbits], (
        "the other one is biased"
    )


@pytest.mark.parametrize("nbits", PAPER_MSE)
def test_codes_are_packed_without_a_wasted_bit(nbits):
    assert code_of(nbits).layout()["packed_codes"].block_bytes * 8 == 32 * DIMENSION * nbits
