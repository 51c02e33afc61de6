"""General quantizers that declare a `PackedFormat`: kernels read what they store, and a false one is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvq import KVQ
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.cli.reader_facts import list_readers
from kvq.errors import QuantizerContractError
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, PackedFormat
from kvq.store import first_blocks
from kvq.testing import ContractCase
from kvq.testing.attention import make_request, measure_attention

WIDTHS = (2, 3, 4, 8)
ROTATED = {"rotation_k": "hadamard", "rotation_v": "hadamard"}


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(first_blocks, "_seen", set())


class Tiles:
    """Affine tiles per channel with a second factor, one a token, that the quantizer chooses itself: its peak."""

    group_local = True
    dim = -2

    def __init__(self, spec):
        self.packed_format = PackedFormat.of(spec, has_factor=spec.granularity is Granularity.PER_CHANNEL)
        self.block_length, self.middle = self.packed_format.block_length, 2 ** (int(spec.nbits) - 1)

    def layout(self):
        return self.packed_format.layout()

    def constants(self):
        return {}

    def encode(self, states):
        blocks = states.float().unflatten(2, (-1, self.block_length))
        parts = {}
        if self.packed_format.has_factor:
            peak = blocks.abs().amax(-1)
            steps = (32 * torch.log2(peak.amax(-1, keepdim=True) / peak)).round().clamp(0, 255)
            parts["factor"], blocks = steps.to(torch.uint8), blocks * 2 ** (steps / 32)[..., None]
        low, high = blocks.amin(self.dim, True), blocks.amax(self.dim, True)
        scale = ((high - low) / (2 * self.middle - 1)).half()
        mid = (low + scale.float() * self.middle).half()
        codes = (blocks - mid) / scale.float() + self.middle
        codes = codes.round().clamp(0, 2 * self.middle - 1).to(torch.uint8)
        return {
            **parts,
            **self.packed_format.pack(codes),
            "scale": scale.squeeze(self.dim),
            "mid": mid.squeeze(self.dim),
        }

    def decode_into(self, parts, out):
        codes = self.packed_format.unpack(parts).float() - self.middle
        states = codes * parts["scale"].float().unsqueeze(self.dim) + parts["mid"].float().unsqueeze(self.dim)
        if self.packed_format.has_factor:
            states *= 2 ** (-parts["factor"].float() / 32)[..., None]
        out.copy_(states.flatten(2, 3))


class Vectors(Tiles):
    """One scale and mid for each token, 8 bits of range in fp16."""

    dim = -1

    def encode(self, states):
        parts = super().encode(states)
        return parts | {name: parts[name][..., None] for name in ("scale", "mid")}

    def decode_into(self, parts, out):
        codes = self.packed_format.unpack(parts).float() - self.middle
        out.copy_((codes * parts["scale"].float() + parts["mid"].float()).flatten(2, 3))


def spec_of(build, nbits=WIDTHS, **fields):
    fields.setdefault("granularities", (Granularity.PER_CHANNEL,))
    return BackendSpec(
        "tiles", API_VERSION, Capabilities(nbits=nbits, **fields), build=lambda spec, options: build(spec)
    )


def fill(build, nbits=4, axis="per_channel", tokens=192, **fields):
    spec = spec_of(build, granularities=tuple(Granularity))
    axes = {"axis_key": axis, "axis_value": axis}
    cache = KVQ(backend=spec, nbits_k=nbits, nbits_v=nbits, residual_length=0, sink_length=0, **axes, **fields)
    states = torch.randn(2, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(0))
    states *= torch.logspace(-2, 2, tokens)[:, None]
    cache.update(*states, 0)
    return torch.stack(cache.materialize(0)), states


@pytest.mark.parametrize("nbits", WIDTHS)
@pytest.mark.parametrize(("build", "axis"), [(Tiles, "per_channel"), (Vectors, "per_token")])
@pytest.mark.parametrize("fields", [{}, ROTATED], ids=["plain", "rotated"])
def test_kernels_read_what_it_stores(nbits, build, axis, fields):
    sizes = {"q_group_size": 64}
    case = ContractCase(spec_of(build, granularities=(Granularity(axis),)), nbits, Granularity(axis))
    request = make_request(case, 1, is_padded=False, order=None, **sizes, **fields)
    kernels = [REFERENCE, CompiledKernel()]
    assert [kernel.why_unsupported(request) for kernel in (*kernels, TRITON)] == [None] * 3
    keys, values = (
        side.materialize().double().repeat_interleave(request.queries_per_head, dim=1)
        for side in (request.pair.key, request.pair.value)
    )
    weights = (request.query.double() @ keys.mT * request.scaling).softmax(-1)
    expected = (weights @ values).transpose(1, 2)
    for kernel in kernels:
        if kernel.why_unavailable() is None:
            error = (kernel.attend(request).double() - expected).abs().max() / expected.abs().max()
            assert error < (1e-5 if kernel is REFERENCE else 1e-4), kernel.name  # it rounds the query to 16 bits


def test_every_kind_of_request():
    errors = dict(measure_attention(ContractCase(spec_of(Tiles), 4, Granularity.PER_CHANNEL)))
    assert max(errors.values()) < 1e-4


def test_the_second_factor_is_worth_its_byte():
    errors = []
    for build in (Tiles, declare(has_factor=False)):
        found, states = fill(build)
        errors.append(((found - states).square().mean(-1) / states.square().mean(-1)).mean())
    assert errors[0] < 0.01 < 10 * errors[0] < errors[1]


def test_the_command_says_that_codes_are_read():
    (row,) = list_readers(spec_of(Tiles))
    assert row["kernels"] == {"compiled": "codes", "triton": "codes", "blockwise": "decoded", "eager": "codes"}


def declare(**changes):
    class Declares(Tiles):
        def __init__(self, spec):
            super().__init__(spec)
            self.packed_format = replace(self.packed_format, **changes)

    return Declares


class AnotherLayout(Tiles):
    def layout(self):
        return {name: part for name, part in super().layout().items() if name != "factor"}


class NoFormat(Tiles):
    def __init__(self, spec):
        super().__init__(spec)
        self.declared, self.packed_format = self.packed_format, "int4"

    def layout(self):
        return self.declared.layout()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (NoFormat, "packed_format is a str, not a PackedFormat"),
        (AnotherLayout, "layout returns"),
        (declare(bits=5), "bits=5 and plane_widths="),
        (declare(block_length=32, group_length=32), "block_length is 32, not 64"),
        (declare(group_length=32), "group_length is 32, not 64"),
        (declare(packed_dim=-2), "packed_dim is -2, not -1"),
        (declare(head_dim=128), "head_dim is 128, not 64"),
        (declare(scale_dtype=torch.bfloat16), "scale and mid are torch.bfloat16 and torch.float16"),
        (declare(scale_dtype=torch.float32, has_exponent=True), "has_exponent goes with a scale in float16"),
        (declare(granularity=Granularity.PER_TOKEN), "has_factor goes with groups per channel"),
        (declare(rotation_block=64), "asks for a constant 'rotation_signs'"),
        (declare(rotation_block=32), "rotation_block is 32, not 64"),
    ],
)
def test_a_declaration_that_kernels_cannot_follow_is_refused(build, told):
    with pytest.raises(QuantizerContractError) as caught:
        fill(build)
    assert told in str(caught.value)
    assert "backend 'tiles', layer 0, keys" in str(caught.value)


class OtherOrder(Tiles):
    """Decodes each token as its neighbour in the block."""

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.copy_(out.unflatten(2, (-1, self.block_length)).roll(1, 3).flatten(2, 3))


class OtherFactor(Tiles):
    """Means another step of the factors than the format has."""

    def decode_into(self, parts, out):
        super().decode_into(parts, out)
        out.mul_(2 ** (-parts["factor"].float() / 64).flatten(2)[..., None])


@pytest.mark.parametrize("build", [OtherOrder, OtherFactor])
@pytest.mark.parametrize("fields", [{}, ROTATED], ids=["plain", "rotated"])
def test_a_declaration_that_means_other_numbers_is_refused_with_the_first_block(build, fields):
    with pytest.raises(
        QuantizerContractError, match=r"read by packed_format, .* kernels would attend to other numbers"
    ):
        fill(build, **fields)
