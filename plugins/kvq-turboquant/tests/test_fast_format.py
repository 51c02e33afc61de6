"""The format that kernels read: where it is chosen, what it costs, and that it comes back from a file."""

import math

import pytest
import torch
from kvq_turboquant.codebook import find_levels, measure_distortion
from kvq_turboquant.plugin import kvq_backend

from kvq import KVQ
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.plugin_api import Granularity
from kvq.testing import ContractCase
from kvq.testing.attention import make_request

PLAIN = {"rotation_k": "none", "rotation_v": "none", "residual_length": 0, "sink_length": 0}


def fill(states, **fields):
    cache = KVQ(backend="turboquant", **{"nbits_k": 4, "nbits_v": 4, **PLAIN, **fields})
    cache.update(states, states, 0)
    return cache


def draw(head_dim=128, share=1.0):
    """Normal numbers; of a smaller share of them the others are 0."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 4, 1024, head_dim, generator=generator)
    return states * (torch.rand(states.shape, generator=generator) < share) * 7


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("share", "least"), [(1.0, 0.98), (0.3, 0.9)])  # of sparse vectors it is smaller
def test_the_squared_error_is_that_of_a_random_matrix(nbits, head_dim, share, least):
    states = draw(head_dim, share)
    errors = {}
    for rotation in ("auto", "random"):
        options = {"turboquant": {"rotation": rotation}}
        found, _ = fill(states, nbits_k=nbits, nbits_v=nbits, backend_options=options).materialize(0)
        errors[rotation] = ((found - states).square().sum(-1) / states.square().sum(-1)).mean().item()
    assert errors["random"] == pytest.approx(measure_distortion(head_dim, find_levels(head_dim, nbits)), rel=0.02)
    assert least * errors["random"] < errors["auto"] < 1.02 * errors["random"]


def is_read(head_dim, nbits, **options):
    codec = fill(draw(head_dim), nbits_k=nbits, nbits_v=nbits, backend_options={"turboquant": options}).layers[0]
    return codec.side("key").codec.packed_format is not None


def test_whole_bits_and_powers_of_two_are_read_by_kernels():
    assert is_read(64, 3)
    assert not is_read(80, 3)
    assert not is_read(64, 2.5)
    assert not is_read(64, 3, inner_product=True)
    assert not is_read(64, 3, rotation="random")


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_compiled_code_attends_to_the_states_that_come_back(nbits):
    kernel = CompiledKernel()
    request = make_request(ContractCase(kvq_backend(), nbits, Granularity.PER_TOKEN), 1, is_padded=False, order=None)
    assert kernel.why_unsupported(request) is None
    if kernel.why_unavailable() is None:
        keys, values = (
            side.materialize().double().repeat_interleave(request.queries_per_head, dim=1)
            for side in (request.pair.key, request.pair.value)
        )
        expected = ((request.query.double() @ keys.mT * request.scaling).softmax(-1) @ values).transpose(1, 2)
        assert (kernel.attend(request).double() - expected).abs().max() < 2e-6 * expected.abs().max()


def test_tokens_of_any_length_share_a_block():
    states = draw() * torch.logspace(-12, 12, 1024)[:, None]
    found, _ = fill(states[:, :, :32]).materialize(0)
    error = (found - states[:, :, :32]).square().sum(-1) / states[:, :, :32].square().sum(-1)
    assert error.max() < 0.03
    found, _ = fill(states).materialize(0)
    assert found.isfinite().all()


def test_a_vector_that_is_not_finite_is_lost_and_no_other():
    states = draw()
    states[0, 1, 40, 3] = math.inf
    found, _ = fill(states).materialize(0)
    assert found.isnan().all(-1).nonzero().tolist() == [[0, 1, 40]]


def test_a_saved_cache_comes_back(tmp_path):
    cache = fill(draw())
    cache.save(tmp_path / "cache.kvq")
    loaded = KVQ.load(tmp_path / "cache.kvq")
    assert torch.equal(loaded.materialize(0)[0], cache.materialize(0)[0])
    assert loaded.layers[0].side("key").codec.constants()["codebook"].shape == (16,)


def test_each_side_has_its_signs_and_codebook():
    signs, levels = 128, 4 * 16
    assert fill(draw()).memory().constant_bytes == 2 * (signs + levels)


def test_a_loaded_cache_changes_no_other(tmp_path):
    with torch.inference_mode():
        cache = fill(draw())
    before = cache.materialize(0)[0]
    codebook = cache.layers[0].side("key").codec.constants()["codebook"]
    own = codebook.clone()
    codebook += 0.1
    cache.save(tmp_path / "cache.kvq")
    codebook.copy_(own)
    loaded = KVQ.load(tmp_path / "cache.kvq")
    assert torch.equal(cache.materialize(0)[0], before)
    assert not torch.equal(loaded.materialize(0)[0], before)
    assert torch.equal(fill(draw()).materialize(0)[0], before)


@pytest.mark.parametrize("rotation", ["auto", "random"])
def test_made_in_inference_mode_it_does_not_stand_in_the_way_of_loading(tmp_path, rotation):
    options = {"turboquant": {"rotation": rotation, "seed": 12}}
    with torch.inference_mode():
        fill(draw(), backend_options=options).save(tmp_path / "cache.kvq")
    KVQ.load(tmp_path / "cache.kvq")
