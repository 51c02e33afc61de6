"""The native backend against fp64 arithmetic, and what the core makes of large offsets for every backend."""

from __future__ import annotations

import textwrap
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError
from kvq.plugin_api import AffineQuantizer
from kvq.registry import get_registry
from kvq.testing.case import PLAIN
from kvq_backends.native import plugin
from kvq_backends.native.quantizer import Frame, sum_pairwise

LENGTHS = (40, 64, 67)
VARIED = ("random", "outlier", "offset", "tiny", "huge")
CLIPS = ("none", "mse")
BACKEND = plugin.kvq_backend()
NBITS = BACKEND.capabilities.nbits


def exact_decode(encoded):
    """Return `scale * code + offset` in fp64, where nothing overflows."""
    codes, scale, offset = (part.double() for part in encoded)
    return scale[..., None] * codes + offset[..., None]


def step_of(groups, nbits):
    """Return the distance of two levels between the extremes, from fp64."""
    exact = groups.double()
    return (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / (2**nbits - 1)


def squared_error(groups, encoded):
    """Return the sum of squared errors of each group in squared ranges, fp64."""
    extent = step_of(groups, 1)
    return ((exact_decode(encoded) - groups.double()) / extent.where(extent > 0, 1)).square().sum(-1)


def heavy_tailed(count, length, seed=0):
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample((count, length))


class Recorder(TorchDispatchMode):
    """Record the operators that run, the size of their largest result, and whether all results are finite."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.largest_bytes = 0
        self.is_finite = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
                self.is_finite &= bool(leaf.isfinite().all())
        return result


class TestBound:
    @pytest.mark.parametrize("kind", [*VARIED, "constant"])
    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_error_is_at_most_half_a_step(
        self, make_groups, build_quantizer, decode, is_within_half_step, check_encoded, kind, length, nbits
    ):
        groups = make_groups(kind, length)
        encoded = build_quantizer(BACKEND, nbits).encode(groups)
        step = step_of(groups, nbits)
        check_encoded(groups, nbits, encoded)
        assert is_within_half_step(groups, decode(*encoded), step)
        if kind != "constant":
            one_bit_fewer = (encoded[0] & 0xFE, *encoded[1:])
            assert not is_within_half_step(groups, decode(*one_bit_fewer), step)

    @pytest.mark.parametrize("kind", VARIED)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_extremes_come_back_exactly(self, make_groups, build_quantizer, kind, nbits):
        groups = make_groups(kind, 64)
        decoded = exact_decode(build_quantizer(BACKEND, nbits).encode(groups))
        rounding = 2.0**-22 * groups.abs().amax(-1, keepdim=True)
        for extreme in (groups.argmin(-1, keepdim=True), groups.argmax(-1, keepdim=True)):
            error = decoded.gather(-1, extreme) - groups.double().gather(-1, extreme)
            assert (error.abs() <= rounding).all()

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_ranges_past_the_largest_fp32(self, make_groups, build_quantizer, check_encoded, nbits, clip):
        groups = make_groups("random", 64).clamp(-4, 4) * 8e37
        assert not (groups.amax(-1) - groups.amin(-1)).isfinite().all()
        encoded = build_quantizer(BACKEND, nbits, clip=clip).encode(groups)
        check_encoded(groups, nbits, encoded)
        if clip == "none":
            error = (exact_decode(encoded) - groups.double()).abs()
            assert (error <= 0.5001 * step_of(groups, nbits)).all()

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_the_largest_range_there_is(self, build_quantizer, check_encoded, nbits, clip):
        groups = torch.linspace(-1, 1, 64)[None] * torch.finfo(torch.float32).max
        encoded = build_quantizer(BACKEND, nbits, clip=clip).encode(groups)
        check_encoded(groups, nbits, encoded)
        if clip == "none":
            assert ((exact_decode(encoded) - groups.double()).abs() <= 0.5001 * step_of(groups, nbits)).all()

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-38, 1e-41, 3e-44])
    @pytest.mark.parametrize("nbits", NBITS)
    def test_denormal_ranges(self, make_groups, build_quantizer, check_encoded, nbits, magnitude, clip):
        groups = make_groups("random", 64) * magnitude
        assert (groups.amax(-1) > groups.amin(-1)).all()
        encoded = build_quantizer(BACKEND, nbits, clip=clip).encode(groups)
        check_encoded(groups, nbits, encoded)
        assert (encoded[1] > 0).all()
        if clip == "none":
            # Half a step, were scales any number; the next denormal number may be half of the least one further.
            bound = 0.5 * step_of(groups, nbits) + 2.0**-22 * groups.double().abs().amax(-1, keepdim=True) + 2.0**-150
            assert ((exact_decode(encoded) - groups.double()).abs() <= bound).all()

    @pytest.mark.parametrize("nbits", NBITS)
    def test_neighbouring_numbers_far_from_zero(self, build_quantizer, decode, is_within_half_step, nbits):
        groups = (11 + 2.0**-20 * torch.arange(11, dtype=torch.float64)).float()[None]
        assert len(groups.unique()) == 11
        decoded = decode(*build_quantizer(BACKEND, nbits).encode(groups))
        assert is_within_half_step(groups, decoded, step_of(groups, nbits))
        if nbits >= 4:
            assert torch.equal(decoded, groups)

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_constant_groups_come_back_exactly(self, make_groups, build_quantizer, decode, nbits, clip):
        groups = make_groups("constant", 48)
        groups[3:7] = torch.tensor([[1e38], [-3e38], [1e-45], [-1e-40]])
        with Recorder() as recorder:
            codes, scale, offset = build_quantizer(BACKEND, nbits, clip=clip).encode(groups)
        # What a nan becomes as an integer is up to the processor.
        assert recorder.is_finite
        assert not scale.any()
        assert not codes.any()
        assert torch.equal(decode(codes, scale, offset), groups)

    @pytest.mark.parametrize("clip", CLIPS)
    def test_groups_of_one_element(self, build_quantizer, decode, clip):
        groups = torch.tensor([[0.0], [-3.5], [1e38]])
        assert torch.equal(decode(*build_quantizer(BACKEND, 2, clip=clip).encode(groups)), groups)


class TestWidths:
    def test_every_code_is_used_and_each_bit_halves_the_error(self, make_groups, build_quantizer):
        groups = make_groups("random", 64, count=512)
        errors = []
        for nbits in NBITS:
            encoded = build_quantizer(BACKEND, nbits).encode(groups)
            assert len(encoded[0].unique()) == 2**nbits
            errors.append(float(squared_error(groups, encoded).mean().sqrt()))
        assert all(2 * more < fewer for fewer, more in pairwise(errors))

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("kind", [*VARIED, "constant"])
    def test_more_bits_are_never_worse(self, make_groups, build_quantizer, kind, clip):
        groups = make_groups(kind, 64)
        errors = [
            float(squared_error(groups, build_quantizer(BACKEND, nbits, clip=clip).encode(groups)).sum())
            for nbits in NBITS
        ]
        assert errors == sorted(errors, reverse=True)

    @pytest.mark.parametrize("nbits", [1.58, 2.5, 9])
    def test_unlisted_width_is_refused(self, nbits):
        with pytest.raises(
            ConfigError, match=r"nbits_k: .* is not supported .*'native'; choose one of 1, 2, 3, 4, 5, 6, 7, 8$"
        ):
            KVQCacheConfig(backend="native", nbits_k=nbits)


class TestClipping:
    @pytest.mark.parametrize("kind", [*VARIED, "constant", "heavy"])
    @pytest.mark.parametrize("nbits", NBITS)
    def test_no_group_gets_worse(self, make_groups, build_quantizer, check_encoded, kind, nbits):
        groups = heavy_tailed(256, 67) if kind == "heavy" else make_groups(kind, 64, count=256)
        clipped = build_quantizer(BACKEND, nbits, clip="mse").encode(groups)
        check_encoded(groups, nbits, clipped)
        assert (
            squared_error(groups, clipped) <= squared_error(groups, build_quantizer(BACKEND, nbits).encode(groups))
        ).all()

    def test_no_group_gets_worse_where_rounding_blurs_the_comparison(self, build_quantizer):
        generator = torch.Generator().manual_seed(0)
        shape = 4096, 64
        on_levels = torch.randint(256, shape, generator=generator) / 255 + 1e-7 * torch.randn(
            shape, generator=generator
        )
        skewed = 1000 + torch.rand(shape, generator=generator.manual_seed(1)).pow(8)
        for groups in (on_levels, skewed):
            plain = squared_error(groups, build_quantizer(BACKEND, 8).encode(groups))
            assert (squared_error(groups, build_quantizer(BACKEND, 8, clip="mse").encode(groups)) <= plain).all()

    @pytest.mark.parametrize("power", [-80, 80])
    @pytest.mark.parametrize("nbits", NBITS)
    def test_magnitude_does_not_matter(self, build_quantizer, nbits, power):
        groups = heavy_tailed(64, 64)
        codes, scale, offset = build_quantizer(BACKEND, nbits, clip="mse").encode(groups)
        scaled = build_quantizer(BACKEND, nbits, clip="mse").encode(groups * 2.0**power)
        assert all(map(torch.equal, scaled, (codes, scale * 2.0**power, offset * 2.0**power)))

    @pytest.mark.parametrize("nbits", NBITS)
    def test_groups_that_are_exact_already_stay_as_they_are(self, build_quantizer, nbits):
        levels = torch.arange(2**nbits).repeat(64)[: max(64, 2**nbits)]
        groups = torch.stack([levels / 3, 100 + levels / 8, -1e-5 * levels])
        plain = build_quantizer(BACKEND, nbits).encode(groups)
        clipped = build_quantizer(BACKEND, nbits, clip="mse").encode(groups)
        assert all(map(torch.equal, plain, clipped))

    def test_every_group_with_an_outlier_gets_better_at_2_bits(self, make_groups, build_quantizer):
        groups = make_groups("outlier", 64, count=256)
        plain = squared_error(groups, build_quantizer(BACKEND, 2).encode(groups))
        clipped = squared_error(groups, build_quantizer(BACKEND, 2, clip="mse").encode(groups))
        assert (clipped < plain).all()
        assert clipped.sum() < 0.35 * plain.sum()

    @pytest.mark.parametrize(("nbits", "at_most"), [(1, 0.12), (2, 0.5), (3, 0.78), (4, 0.9), (8, 0.96)])
    def test_gain_on_heavy_tails(self, build_quantizer, nbits, at_most):
        groups = heavy_tailed(1024, 64)
        plain = squared_error(groups, build_quantizer(BACKEND, nbits).encode(groups))
        clipped = squared_error(groups, build_quantizer(BACKEND, nbits, clip="mse").encode(groups))
        assert clipped.sum() < at_most * plain.sum()
        if nbits <= 2:
            assert (clipped < plain).float().mean() > 0.99

    def test_one_bit_comes_close_to_the_best_two_levels(self, make_groups, build_quantizer):
        # Two levels split the sorted elements in two; here every split is tried, in fp64.
        groups = make_groups("random", 64, count=512).double().sort(-1).values
        sizes = torch.arange(1, 64)
        sums = groups.cumsum(-1)
        low, total = sums[:, :-1], sums[:, -1:]
        least = groups.square().sum(-1) - (low.square() / sizes + (total - low).square() / (64 - sizes)).amax(-1)
        clipped = exact_decode(build_quantizer(BACKEND, 1, clip="mse").encode(groups.float()))
        error = (clipped - groups).square().sum(-1)
        assert (error > 0.9999 * least).all()
        assert error.sum() < 1.03 * least.sum()

    def test_a_fitted_line_is_the_least_squares_line(self, make_groups):
        groups = make_groups("random", 64)
        frame = Frame.of(groups, largest_code=3)
        plain = frame.line_between(1.0)
        fitted = frame.fit_line(plain)
        codes = frame.find_codes(plain).double()
        system = torch.stack([codes, torch.ones_like(codes)], dim=-1)
        expected = torch.linalg.lstsq(system, groups.double()[..., None]).solution.squeeze(-1)
        assert torch.allclose(torch.cat([fitted.scale, fitted.offset], dim=-1).double(), expected, rtol=1e-5)

    def test_a_fitted_line_past_the_largest_fp32_stays_finite(self):
        group = torch.tensor([0.0, *[0.17] * 31, *[0.83] * 31, 1.0])
        frame = Frame.of((2 * group - 1)[None] * torch.finfo(torch.float32).max, largest_code=3)
        line = frame.fit_line(frame.line_between(1.0))
        assert line.offset.isfinite().all()
        assert line.scale.isfinite().all()

    def test_more_candidates_find_more(self, build_quantizer):
        groups = heavy_tailed(1024, 64)
        errors = [
            float(
                squared_error(groups, build_quantizer(BACKEND, 4, clip="mse", clip_candidates=n).encode(groups)).sum()
            )
            for n in (1, 4, 16)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.98 * errors[0]

    @pytest.mark.parametrize(
        "options", [{"clip": "max"}, {"clip_candidates": 0}, {"clip_candidates": 257}, {"candidates": 4}]
    )
    def test_wrong_options_are_refused(self, options):
        with pytest.raises(ValidationError):
            BACKEND.build_options(options)


class TestLocality:
    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("length", [*LENGTHS, 3, 256])
    @pytest.mark.parametrize("nbits", NBITS)
    def test_a_group_gets_the_same_bits_in_any_batch(self, make_groups, build_quantizer, nbits, length, clip):
        quantizer = build_quantizer(BACKEND, nbits, clip=clip)
        assert quantizer.group_local is True
        groups = torch.cat([make_groups(kind, length, count=4) for kind in (*VARIED, "constant")])
        batch = quantizer.encode(groups)
        for row in range(len(groups)):
            alone = quantizer.encode(groups[row])
            assert all(torch.equal(part, whole[row]) for part, whole in zip(alone, batch, strict=True))
        shuffled = torch.randperm(len(groups))
        nested = quantizer.encode(groups[shuffled].reshape(2, 3, 4, length))
        for part, whole in zip(nested, batch, strict=True):
            assert torch.equal(part.flatten(0, 2), whole[shuffled])

    @pytest.mark.parametrize("clip", CLIPS)
    def test_no_operator_chooses_its_own_order(self, make_groups, build_quantizer, clip):
        # On CUDA the order in which these add depends on the shape of the batch, which no test on the CPU would show.
        with Recorder() as recorder:
            build_quantizer(BACKEND, 2, clip=clip).encode(make_groups("random", 64))
        used = {name.removeprefix("aten::").partition(".")[0].rstrip("_") for name in recorder.names}
        assert {"amin", "amax", "round", "div"} <= used
        assert used.isdisjoint(
            {"sum", "mean", "std", "var", "norm", "linalg_vector_norm", "mm", "bmm", "dot", "cumsum"}
        )

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 67, 255])
    def test_pairwise_sums_are_sums(self, make_groups, length):
        values = make_groups("random", length)
        before = values.clone()
        total = sum_pairwise(values)
        assert total.shape == (len(values), 1)
        assert torch.allclose(total.double(), values.double().sum(-1, keepdim=True), atol=1e-5)
        assert torch.equal(values, before)


class TestCost:
    @pytest.mark.parametrize("clip", CLIPS)
    def test_work_is_batched_and_temporaries_are_bounded(self, build_quantizer, clip):
        quantizer = build_quantizer(BACKEND, 3, clip=clip)
        counts = []
        for groups in (torch.randn(1, 64), torch.randn(1 << 14, 64)):
            with Recorder() as recorder:
                quantizer.encode(groups)
            counts.append(len(recorder.names))
        assert counts[0] == counts[1]
        assert recorder.largest_bytes == groups.numel() * groups.element_size() == 1 << 22

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("nbits", NBITS)
    def test_encode_leaves_its_input_alone(self, make_groups, build_quantizer, check_encoded, nbits, clip):
        quantizer = build_quantizer(BACKEND, nbits, clip=clip)
        assert isinstance(quantizer, AffineQuantizer)
        groups = make_groups("random", 48, count=12).reshape(2, 6, 48).transpose(0, 1).requires_grad_()
        before = groups.detach().clone()
        encoded = quantizer.encode(groups)
        check_encoded(groups, nbits, encoded)
        assert all(type(part) is torch.Tensor and part.is_contiguous() for part in encoded)
        for part in encoded:
            part.add_(1)
        assert torch.equal(groups, before)
        assert torch.equal(encoded[0] - 1, quantizer.encode(before.contiguous())[0])


class TestInTheCache:
    @staticmethod
    def fill(states, **config):
        """Return what comes back of `states` used as keys and as values, all of them stored, and the cache."""
        cache = KVQ(residual_length=0, sink_length=0, **config)
        cache.update(states, states, 0)
        assert cache.layers[0].side("key").store.length == states.shape[2]
        return *cache.materialize(0), cache

    @pytest.mark.parametrize("nbits", NBITS)
    def test_codes_take_their_bits_and_no_more(self, nbits):
        states = torch.randn(2, 2, 128, 64)
        keys, values, cache = self.fill(states, backend="native", nbits_k=nbits, nbits_v=nbits)
        for name, side in cache.layers[0].sides():
            layout = side.codec.layout()
            code_bytes = sum(part.block_bytes for part_name, part in layout.items() if part_name.startswith("codes"))
            assert 8 * code_bytes == nbits * side.codec.block_length * 64, name
            stored = [part.nbytes for segment in side.store.segments for part in segment.parts.values()]
            blocks = 2 * 2 * 128 // side.codec.block_length
            assert sum(stored) == blocks * sum(part.block_bytes for part in layout.values())
        assert not torch.equal(keys, values)

    @pytest.mark.parametrize("axis", ["per_channel", "per_token"])
    @pytest.mark.parametrize("nbits", NBITS)
    def test_states_come_back_within_half_a_step(self, nbits, axis):
        states = torch.randn(2, 2, 128, 64, generator=torch.Generator().manual_seed(nbits))
        widths = {"nbits_k": nbits, "nbits_v": nbits, "axis_key": axis, "axis_value": axis}
        keys, values, _ = self.fill(states, backend="native", metadata_dtype="float32", **widths, **PLAIN)
        groups = states.unflatten(2, (2, 64)).transpose(-1, -2) if axis == "per_channel" else states
        step = step_of(groups, nbits)
        for decoded in (keys, values):
            grouped = decoded.unflatten(2, (2, 64)).transpose(-1, -2) if axis == "per_channel" else decoded
            error = (grouped.double() - groups.double()).abs()
            assert (error <= 0.5 * step + 1e-5).all()
            assert (error > 0.45 * step).any()

    @pytest.mark.parametrize("clip", CLIPS)
    def test_three_bits_token_by_token(self, clip):
        states = torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        config = {"backend": "native", "nbits_k": 3, "nbits_v": 3, "backend_options": {"native": {"clip": clip}}}
        config |= {"axis_value": "per_token", "residual_length": 128, **PLAIN}
        whole, single = KVQ(config), KVQ(config)
        whole.update(states, states, 0)
        for token in states.split(1, dim=2):
            single.update(token, token, 0)
        assert whole.layers[0].side("key").store.length == 128
        for ours, theirs in zip(whole.materialize(0), single.materialize(0), strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours[:, :, 128:], states[:, :, 128:])
            error = (ours - states).float()[:, :, :128].square().mean().sqrt()
            assert 0.1 < error < 0.25


WIDTHS = [
    (name, nbits)
    for name in ("native", "quanto", "hqq")
    for nbits in get_registry().get_backend(name).capabilities.nbits
]


@pytest.mark.parametrize(
    ("magnitude", "group_size", "axis"),
    [
        (1.0, 64, "per_channel"),
        (1.0, 64, "per_token"),
        (1.0, 16, "per_channel"),
        (1.0, 16, "per_token"),
        (1e-5, 64, "per_channel"),
        (1e6, 16, "per_token"),
    ],
)
@pytest.mark.parametrize(("backend", "nbits"), WIDTHS)
def test_large_offsets_cost_little_more_than_with_fp32_metadata(backend, nbits, magnitude, group_size, axis):
    signs = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
    states = (torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0)) + 100 * signs) * magnitude
    config = {"backend": backend, "nbits_k": nbits, "nbits_v": nbits, "axis_key": axis, "axis_value": axis}
    config["q_group_size"] = group_size
    if axis == "per_token":
        config |= PLAIN  # an offset that all channels share is the middle of a token's group until it is rotated

    def mean_errors(**more):
        decoded = TestInTheCache.fill(states, **config, **more)[:2]
        return [float((part.double() - states.double()).abs().mean()) for part in decoded]

    for default, exact in zip(mean_errors(), mean_errors(metadata_dtype="float32"), strict=True):
        assert default <= 1.1 * exact
        assert exact < 2 * magnitude


@pytest.mark.costly
def test_plugin_needs_torch_alone(modules_after_import):
    code = """
        import torch
        from kvq_backends.native import plugin
        from kvq_backends.native.quantizer import NativeQuantizer
        assert plugin.kvq_backend().requires == ()
        plugin.kvq_backend().build_options()
        NativeQuantizer(3, clip_candidates=4).encode(torch.randn(2, 8))
    """
    modules = modules_after_import(textwrap.dedent(code))
    assert "kvq_backends" in modules
    assert modules.isdisjoint({"optimum", "hqq", "transformers"})


def test_registry_accepts_the_spec():
    backend = get_registry().get_backend("native")
    get_registry().check_requirements(backend)
    assert backend == BACKEND


@pytest.mark.parametrize(("axis", "word"), [(0, "per_token"), (-1, "per_channel")])
def test_integer_axes_mean_what_they_mean_in_transformers(axis, word):
    config = KVQCacheConfig(backend="native", axis_key=axis, axis_value=axis)
    assert str(config.axis_key) == str(config.axis_value) == word
