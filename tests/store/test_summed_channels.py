"""Formats with more channels than the states have elements: an element is a sum, and elements differ in width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_attention import attend
from summed_channels import FINE, Residual, spec_of

from kvq import KVQ
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.errors import QuantizerContractError
from kvq.plugin_api import Granularity, PackedFormat
from kvq.store import first_blocks
from kvq.testing import ContractCase
from kvq.testing.attention import make_request, measure_attention


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(first_blocks, "_seen", set())


def fill(build, **fields):
    cache = KVQ(backend=spec_of(build), nbits_k=2, nbits_v=2, residual_length=0, sink_length=0, **fields)
    states = torch.randn(2, 3, 192, 64, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    return cache, states


@pytest.mark.parametrize("nbits", [2, 3])
@pytest.mark.parametrize("queries", [1, 3])
def test_kernels_read_the_sums(nbits, queries):
    case = ContractCase(spec_of(Residual), nbits, Granularity.PER_CHANNEL)
    request = make_request(case, queries, is_padded=False, order=None)
    expected = attend(request)
    for kernel, bound in ((REFERENCE, 1e-5), (CompiledKernel(), 1e-4)):  # compiled code rounds the query to 16 bits
        assert kernel.why_unsupported(request) is None
        if kernel.why_unavailable() is None:
            error = (kernel.attend(request).double() - expected).abs().max() / expected.abs().max()
            assert error < bound, kernel.name
    assert TRITON.why_unsupported(request) is None  # tests/attention/interpreted_triton.py runs it


def test_every_kind_of_request():
    errors = dict(measure_attention(ContractCase(spec_of(Residual), 2, Granularity.PER_CHANNEL)))
    assert max(errors.values()) < 1e-4


def test_channels_that_are_stored_twice_are_finer():
    cache, states = fill(Residual)
    error = (cache.materialize(0)[0] - states).square().mean((0, 2))
    fine = cache.layers[0].side("key").codec.constants()["channel_sources"][:, 64:].long()
    is_fine = torch.zeros(3, 64, dtype=torch.bool).scatter_(1, fine, value=True)
    assert 7 * error[is_fine].mean() < error[~is_fine].mean()  # three steps of what was one are a ninth of the energy


def test_rotated_ones_are_decoded():
    case = ContractCase(spec_of(Residual), 2, Granularity.PER_CHANNEL)
    request = make_request(case, 1, is_padded=False, order=None, rotation_k="hadamard")
    assert CompiledKernel().why_unsupported(request).startswith("serves quantizers with a packed format")
    expected = attend(request)
    assert (REFERENCE.attend(request).double() - expected).abs().max() < 1e-5 * expected.abs().max()


def declare(**changes):
    class Declares(Residual):
        def __init__(self, spec):
            super().__init__(spec)
            if self.is_key:
                self.packed_format = replace(self.packed_format, **changes)

    return Declares


def with_sources(change):
    class Changed(Residual):
        def __init__(self, spec):
            super().__init__(spec)
            self.sources = change(self.sources)

    return Changed


class SumsValues(Residual):
    def __init__(self, spec):
        super().__init__(spec)
        self.packed_format = PackedFormat.of(spec, stored_channels=spec.head_dim + FINE)

    def constants(self):
        return {"channel_sources": self.sources}


def out_of_reach(sources):
    return torch.where(sources == 63, 64, sources)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (declare(states_dim=32), "states_dim is 32, not 64"),
        (with_sources(torch.Tensor.long), "states_dim asks for a constant 'channel_sources', int32 [3, 88]"),
        (with_sources(lambda sources: sources[:, 1:]), "int32 [3, 88]"),
        (with_sources(out_of_reach), "no elements of a head of 64"),
        (with_sources(torch.neg), "no elements of a head of 64"),
        (SumsValues, "states_dim goes with keys alone"),
        (declare(rotation_block=64), "states that are not rotated"),
    ],
)
def test_a_declaration_that_kernels_cannot_follow_is_refused(build, told):
    with pytest.raises(QuantizerContractError) as caught:
        fill(build)
    assert told in str(caught.value)


def test_sums_that_mean_other_elements_are_refused_with_the_first_block():
    class Shifted(Residual):
        def constants(self):
            return {"channel_sources": self.sources.roll(1, 1)} if self.is_key else {}

    with pytest.raises(QuantizerContractError, match="kernels would attend to other numbers"):
        fill(Shifted)


def test_compiled_code_reads_nothing_beyond_the_query(tmp_path):
    """What a loaded cache has in its constants was written by its file."""
    case = ContractCase(spec_of(Residual), 2, Granularity.PER_CHANNEL)
    request, kernel = make_request(case, 1, is_padded=False, order=None), CompiledKernel()
    request.pair.key.store.codec.constants()["channel_sources"][0, 5] = 1 << 20
    if kernel.why_unavailable() is None:
        with pytest.raises(QuantizerContractError, match="leads to elements that a head of 64 lacks"):
            kernel.attend(request)


@pytest.mark.parametrize("axis", list(Granularity))
def test_blocks_have_the_length_that_is_asked_for(axis):
    spec = replace(request_spec(), granularity=axis)
    packed = PackedFormat.of(spec, block_length=24)
    assert packed.block_length == 24
    assert packed.group_length == (24 if axis is Granularity.PER_CHANNEL else 64)
    codes = torch.randint(0, 4, (2, 24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed.unpack(packed.pack(codes)), codes)


def request_spec():
    """The spec of keys of 2 bits in groups of 64."""
    seen = []
    spec = replace(spec_of(Residual), build=lambda spec, options: seen.append(spec) or Residual(spec))
    states = torch.randn(1, 3, 100, 64)
    KVQ(backend=spec, nbits_k=2, nbits_v=2).update(states, states, 0)
    return seen[0]
