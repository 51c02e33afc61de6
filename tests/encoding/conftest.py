"""Codecs and states for the tests of quantizing in C."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from kvq.encoding import encoder
from kvq.encoding.encoder import CompiledEncoder, Trust
from kvq.encoding.library import why_encode_unavailable
from kvq.plugin_api import Granularity, LayerStatistics, QuantSpec
from kvq.store.affine import AffineCodec, balanced_group_length
from kvq.store.error_feedback import ErrorFeedback
from kvq.store.rotation import HadamardRotation
from kvq_backends.native.quantizer import NativeQuantizer

METADATA = ((torch.float16, None), (torch.float32, torch.float16), (torch.float32, torch.float32), (torch.int8, None))
"""Dtypes of mids and of scales."""


@pytest.fixture(autouse=True)
def own_trust(monkeypatch: pytest.MonkeyPatch) -> Trust:
    """Let a test begin as a process does, without a word on what others found."""
    trust = Trust()
    monkeypatch.setattr(encoder, "TRUST", trust)
    return trust


@pytest.fixture
def compiled() -> None:
    """Skip where there is no compiler."""
    reason = why_encode_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def make_codec() -> Callable[..., AffineCodec]:
    """Return a function that builds a codec whose blocks C may encode."""

    def make(
        bits=4, side="key", granularity=Granularity.PER_CHANNEL, head_dim=64, group_size=32, *, heads=2,
        dtype=torch.float32, metadata=METADATA[0], is_rotated=False, quantizer=None, query_moment=None, **more,
    ) -> AffineCodec:  # fmt: skip
        per_token, device = granularity is Granularity.PER_TOKEN, torch.device("cpu")
        length = balanced_group_length(head_dim, group_size) if per_token else group_size
        spec = QuantSpec(side, 0, bits, granularity, length, heads, head_dim, dtype, metadata[0], device, seed=bits)
        rotation = HadamardRotation(head_dim, bits, device) if is_rotated else None
        quantizer = quantizer or NativeQuantizer(bits)
        feedback = None if query_moment is None else ErrorFeedback(_make_statistics(query_moment), rotation)
        return AffineCodec(
            quantizer, spec, rotation, torch.float32, metadata[1], "native", encoder=CompiledEncoder(),
            feedback=feedback, **more,
        )  # fmt: skip

    return make


@pytest.fixture
def draw() -> Callable[[int], Iterator[tuple[dict, torch.Tensor]]]:
    """Return a function that draws codecs' arguments, and states for each that lead through different code."""

    def drawn(seed: int, count: int) -> Iterator[tuple[dict, torch.Tensor]]:
        chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)  # noqa: S311  # draws tests
        for _ in range(count):
            options = _draw_options(chosen)
            length = options["group_size"] if options["granularity"] is Granularity.PER_CHANNEL else 32
            shape = (chosen.randint(1, 2), chosen.randint(1, 3) * length, options["heads"], options["head_dim"])
            states = torch.randn(shape, generator=generator).transpose(1, 2)
            states = states * chosen.choice([1, 1, 1e-3, 1e-30, 1e-38, 1e-43, 1e30, 1e38, 3e38])
            states = states + chosen.choice([0, 0, 5, 100]) * states.abs().max()
            _spoil(states, chosen)
            yield options, states.to(options["dtype"])

    return drawn


def _make_statistics(query_moment: torch.Tensor) -> LayerStatistics:
    ends = torch.zeros(query_moment.shape[:2])
    return LayerStatistics(query_moment, ends, ends, ends, query_moment)


def _draw_options(chosen: random.Random) -> dict:
    per_channel, bits = chosen.random() < 0.5, chosen.randint(1, 8)
    return {
        "bits": bits,
        "side": chosen.choice(["key", "value"]),
        "granularity": Granularity.PER_CHANNEL if per_channel else Granularity.PER_TOKEN,
        "head_dim": chosen.choice([1, 3, 8, 48, 64, 67, 80, 96, 128]),
        "group_size": chosen.choice([8, 16, 32, 64]),
        "heads": chosen.randint(1, 3),
        "dtype": chosen.choice([torch.float32, torch.bfloat16, torch.float16]),
        "metadata": chosen.choice(METADATA[: 4 if bits <= 4 else 3]),
        "is_rotated": chosen.random() < 0.5,
        "balanced": per_channel and chosen.random() < 0.6,
        "clip_share": chosen.choice([1.0, 0.9, 0.5]),
    }


def _spoil(states: torch.Tensor, chosen: random.Random) -> None:
    """Put in what is rare: numbers that are not finite, zeros, equal numbers."""
    kind = chosen.choice(["", "", "", "nan", "inf", "zeros", "half", "equal", "mixed"])
    if kind == "nan":
        states[..., 0] = torch.nan
    elif kind == "inf":
        states[0, 0, 0, 0] = torch.inf
    elif kind == "zeros":
        states.zero_()
    elif kind == "half":
        states[:, :, ::2] = 0
    elif kind == "equal":
        states.fill_(float(states[0, 0, 0, 0]))
    elif kind == "mixed":
        states[0, 0, 0], states[0, 0, 1] = 0, -torch.inf
