"""Formats whose codes are places in a codebook: kernels look them up, and a false codebook is refused."""

from __future__ import annotations

import weakref

import pytest
import torch
from codebook_groups import Codebook, spec_of
from exact_attention import attend

from kvq import KVQ
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.compiled.store_addresses import StoreAddresses
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.cli.reader_facts import list_readers
from kvq.errors import QuantizerContractError
from kvq.plugin_api import Granularity, hadamard_transform
from kvq.store import first_blocks
from kvq.testing import ContractCase
from kvq.testing.attention import make_request, measure_attention

ROTATED = {"rotation_k": "hadamard", "rotation_v": "hadamard"}


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(first_blocks, "_seen", set())


def fill(build=Codebook, nbits=4, **fields):
    cache = KVQ(backend=spec_of(build), nbits_k=nbits, nbits_v=nbits, residual_length=0, sink_length=0, **fields)
    states = torch.randn(2, 2, 3, 192, 64, generator=torch.Generator().manual_seed(0))
    cache.update(*states, 0)
    return cache, states


def request_of(nbits, axis, queries=1, **fields):
    return make_request(ContractCase(spec_of(), nbits, axis), queries, is_padded=False, order=None, **fields)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", list(Granularity))
@pytest.mark.parametrize(("queries", "fields"), [(1, {}), (3, {}), (1, ROTATED)], ids=["plain", "several", "rotated"])
def test_kernels_look_codes_up(nbits, axis, queries, fields):
    request = request_of(nbits, axis, queries, **fields)
    expected = attend(request)
    for kernel in (REFERENCE, CompiledKernel()):
        assert kernel.why_unsupported(request) is None
        if kernel.why_unavailable() is None:
            error = (kernel.attend(request).double() - expected).abs().max() / expected.abs().max()
            assert error < 2e-6, kernel.name
    assert TRITON.why_unsupported(request) is None  # tests/attention/interpreted_triton.py runs it


@pytest.mark.parametrize("axis", list(Granularity))
def test_every_kind_of_request(axis):
    errors = dict(measure_attention(ContractCase(spec_of(), 4, axis)))
    assert max(errors.values()) < 2e-6


@pytest.mark.parametrize("length", [32, 24, 17])
def test_scales_of_parts_of_a_token(length):
    request = request_of(4, Granularity.PER_TOKEN, q_group_size=length)
    expected = attend(request)
    error = (CompiledKernel().attend(request).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


def test_a_mid_beside_a_codebook():
    class Shifted(Codebook):
        def __init__(self, spec):
            super().__init__(spec, mid_dtype=torch.float16)

        def encode(self, states):
            found = super().encode(states - 3)
            return {**found, "mid": torch.full_like(found["scale"], 3, dtype=torch.float16)}

        def decode_into(self, parts, out):
            super().decode_into(parts, out)
            out += 3

    request = make_request(ContractCase(spec_of(Shifted), 4, Granularity.PER_TOKEN), 1, is_padded=False, order=None)
    expected = attend(request)
    error = (CompiledKernel().attend(request).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


class Rotates(Codebook):
    """Rotates by a transform of its own, which a kernel undoes on the query."""

    def __init__(self, spec):
        super().__init__(spec, rotation_block=spec.head_dim)
        self.signs = torch.tensor([1, -1, -1, 1], dtype=torch.int8).repeat(spec.head_dim // 4)

    def constants(self):
        return {**super().constants(), "rotation_signs": self.signs}

    def encode(self, states):
        return super().encode(hadamard_transform(states.float() * self.signs))

    def decode_into(self, parts, out):
        rotated = torch.empty_like(out, dtype=torch.float32)
        super().decode_into(parts, rotated)
        out.copy_(hadamard_transform(rotated) * self.signs)


@pytest.mark.parametrize("fields", [{}, ROTATED], ids=["plain", "rotated"])
def test_rotations_of_the_core_and_of_the_backend(fields):
    case = ContractCase(spec_of(Rotates), 4, Granularity.PER_TOKEN)
    request = make_request(case, 1, is_padded=False, order=None, **fields)
    expected = attend(request)
    kernels = [REFERENCE, CompiledKernel()]
    is_read = [kernel.why_unsupported(request) is None for kernel in (*kernels, TRITON)]
    assert is_read == ([True] * 3 if not fields else [True, False, False])
    for kernel in kernels[: sum(is_read)]:
        if kernel.why_unavailable() is None:
            error = (kernel.attend(request).double() - expected).abs().max() / expected.abs().max()
            assert error < 2e-6, kernel.name


def test_a_codebook_lives_as_long_as_compiled_code_has_its_address(monkeypatch):
    request, made = request_of(4, Granularity.PER_TOKEN), []

    def constants(self):
        levels = self.levels.clone()
        made.append((levels.data_ptr(), weakref.ref(levels)))
        return {"codebook": levels}

    monkeypatch.setattr(Codebook, "constants", constants)
    addresses = StoreAddresses.of(request.pair)
    for side in (addresses.request.key, addresses.request.value):
        assert any(levels() is not None for place, levels in made if place == side.levels)


def test_there_is_no_byte_for_mids():
    cache, _ = fill()
    parts = cache.layers[0].side("key").codec.layout()
    assert list(parts) == ["codes_4", "scale"]


def test_the_command_says_that_codes_are_read():
    row, *_ = list_readers(spec_of())
    assert row["kernels"] == {"compiled": "codes", "triton": "codes", "blockwise": "decoded", "eager": "codes"}


def with_constant(change):
    class Changed(Codebook):
        def constants(self):
            return {name: change(levels) for name, levels in super().constants().items()}

    return Changed


class NoConstant(Codebook):
    def constants(self):
        return {}


@pytest.mark.parametrize(
    "build",
    [
        NoConstant,
        with_constant(torch.Tensor.double),
        with_constant(lambda levels: levels[:-1]),
        with_constant(lambda levels: levels[None]),
        with_constant(lambda levels: levels.repeat_interleave(2)[::2]),
    ],
)
def test_a_constant_that_is_no_codebook_is_refused(build):
    with pytest.raises(QuantizerContractError, match=r"asks for a constant 'codebook', float32 \[16\], contiguous"):
        fill(build)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 0, 1e-3, 1e5])
def test_a_codebook_that_float16_does_not_hold_is_refused(factor):
    with pytest.raises(QuantizerContractError, match="the largest number of 'codebook' is"):
        fill(with_constant(lambda levels: levels * factor))


@pytest.mark.parametrize(
    "change", [torch.Tensor.int, lambda signs: signs[:-1], lambda signs: signs.repeat_interleave(2)[::2]]
)
def test_signs_that_kernels_cannot_read_are_refused(change):
    class Changed(Rotates):
        def constants(self):
            constants = super().constants()
            return {**constants, "rotation_signs": change(constants["rotation_signs"])}

    with pytest.raises(QuantizerContractError, match="asks for a constant 'rotation_signs', int8"):
        fill(Changed, axis_key="per_token", axis_value="per_token")


def test_compiled_code_reads_nothing_behind_signs(monkeypatch):
    case = ContractCase(spec_of(Rotates), 4, Granularity.PER_TOKEN)
    request, kernel = make_request(case, 1, is_padded=False, order=None), CompiledKernel()
    own = Rotates.constants
    monkeypatch.setattr(
        Rotates, "constants", lambda self: {**own(self), "rotation_signs": self.signs.repeat_interleave(2)[::2]}
    )
    if kernel.why_unavailable() is None:
        with pytest.raises(QuantizerContractError, match="'rotation_signs' is not int8"):
            kernel.attend(request)


def test_states_without_numbers_can_be_stored():
    cache = KVQ(backend=spec_of(), nbits_k=4, nbits_v=4, residual_length=0, sink_length=0)
    states = torch.empty(2, 3, 192, 64, device="meta")
    cache.update(states, states, 0)
    assert cache.layers[0].side("key").store.length == 192


def test_moving_its_tokens_twice_warns(recwarn):
    cache, _ = fill(axis_key="per_token", axis_value="per_token")
    for length in (190, 188):
        cache.evict(0, torch.arange(length) + 2)
    assert [str(one.message).count("vectors of a codebook") for one in recwarn] == [1]


def test_a_codebook_of_other_numbers_is_refused_with_the_first_block():
    with pytest.raises(QuantizerContractError, match="kernels would attend to other numbers"):
        fill(with_constant(lambda levels: levels.flip(0)))


@pytest.mark.parametrize("kernel", [CompiledKernel(), TRITON], ids=lambda kernel: kernel.name)
def test_no_kernel_reads_behind_a_codebook(kernel, monkeypatch):
    """What a loaded cache has in its constants was written by its file."""
    request = request_of(4, Granularity.PER_CHANNEL)
    monkeypatch.setattr(Codebook, "constants", lambda self: {"codebook": self.levels[:8].clone()})
    if kernel.why_unavailable() is None:
        with pytest.raises(QuantizerContractError, match=r"'codebook' is not float32 \[16\] and contiguous"):
            kernel.attend(request)
