"""The compiled kernel's products of whole numbers: how exact they are, and the largest sums."""

from dataclasses import replace

import pytest
import torch

from kvq.attention.kernels.own_kernels import OWN_KERNELS

ERROR = 1e-4
"""What the kernel is held to in fp32, as a share of the largest output."""
DEFAULT_STEPS = dict(
    axis_value="per_channel",
    rotation_k="hadamard",
    rotation_v="hadamard",
    balance_k="rms",
    balance_v="rms",
    octaves=1.0,
)


@pytest.fixture
def kernel():
    chosen = next(kernel for kernel in OWN_KERNELS if kernel.name == "compiled")
    if (problem := chosen.why_unavailable()) is not None:
        pytest.skip(problem)
    return chosen


@pytest.mark.parametrize("scaling", [0.01, 0.1, 0.2, 0.4, 2.0])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_sharpness(kernel, make_request, reference, error_of, bits, scaling):
    request = make_request(nbits_k=bits, nbits_v=bits, head_dim=64, tokens=700, **DEFAULT_STEPS)
    request = replace(request, scaling=scaling)
    assert error_of(kernel.attend(request), reference(request)) < ERROR


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("sharing", [1, 2, 4, 5, 8, 16])
def test_every_shape(kernel, make_request, reference, error_of, head_dim, sharing):
    for options in (DEFAULT_STEPS, {}, dict(axis_key="per_token", axis_value="per_token")):
        request = make_request(
            batch=1, sharing=sharing, head_dim=head_dim, tokens=300, q_group_size=64, nbits_k=4, nbits_v=2, **options
        )
        assert error_of(kernel.attend(request), reference(request)) < ERROR


@pytest.mark.parametrize("group", [8, 16, 24, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_blocks_of_every_length(kernel, make_request, reference, error_of, group, bits):
    request = make_request(
        heads=1, q_group_size=group, nbits_k=bits, nbits_v=bits, head_dim=64, tokens=600, axis_value="per_channel"
    )
    assert request.pair.key.store.codec.block_length == group
    assert error_of(kernel.attend(request), reference(request)) < ERROR


@pytest.mark.parametrize("head_dim", [33, 36, 67, 80, 100, 130])
def test_groups_of_a_token_that_fill_no_vector(kernel, make_request, reference, error_of, head_dim):
    """A group ends in the middle of a vector, or of a pair: the next one has another scale."""
    options = dict(axis_key="per_token", axis_value="per_token", q_group_size=32, nbits_k=5, nbits_v=3)
    request = make_request(head_dim=head_dim, **options)
    packed = request.pair.key.store.codec.packed_format
    assert packed.groups_per_token > 1
    assert packed.group_length % 8
    assert error_of(kernel.attend(request), reference(request)) < ERROR


@pytest.mark.parametrize(("octaves", "scaling", "bound"), [(1.0, 1.0, 1e-5), (6.0, 2.0, 3e-6)])
def test_sharp_scores_are_as_exact_as_in_fp32(kernel, make_request, reference, error_of, octaves, scaling, bound):
    """Where rounding to 16 bits would show, the remainders are multiplied too, by the factors of tokens as well."""
    request = make_request(head_dim=64, tokens=700, **{**DEFAULT_STEPS, "octaves": octaves})
    request = replace(request, scaling=scaling)
    assert error_of(kernel.attend(request), reference(request)) < bound


@pytest.mark.parametrize("sharing", [4, 6])
def test_rows_of_one_head_that_need_one_layer_and_two(kernel, make_request, reference, error_of, sharing):
    """Sharp rows, which have a second layer, stand between flat ones; the sharp ones are as exact as in fp32."""
    request = make_request(head_dim=64, tokens=700, heads=1, sharing=sharing, **DEFAULT_STEPS)
    sharp = torch.arange(sharing) % 2 == 1
    request.query.mul_(torch.where(sharp, 10.0, 0.1)[:, None, None])
    output, expected = kernel.attend(request), reference(request)
    assert error_of(output[:, :, ~sharp], expected[:, :, ~sharp]) < ERROR
    assert error_of(output[:, :, sharp], expected[:, :, sharp]) < 1e-5


def with_outliers(rise=0.0):
    """Return what gives keys a channel that is equal but for one token in 32, and one that rises from block to block.

    The first makes the step large that all numbers of a row are rounded to, without making scores differ.
    """

    def change(keys, values):
        keys[..., 0] = 0.0
        keys[:, :, 7::32, 0] = -100.0
        keys[..., 1] = rise * (torch.arange(keys.shape[2]) // 32)

    return change


@pytest.mark.parametrize("rise", [0.0, 2.0])
def test_errors_of_many_blocks_are_counted_together(kernel, make_request, reference, error_of, rise):
    """Each block may be rounded in one layer beside all that came before, but not all of them."""
    request = make_request(
        batch=1, tokens=6400, head_dim=64, residual_length=0, axis_value="per_channel", offset=0.0,
        change=with_outliers(rise),
    )  # fmt: skip
    request.query[..., :2] = torch.tensor([0.7, 10.0])
    assert error_of(kernel.attend(request), reference(request)) < 7e-5


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_of_many_groups_of_a_token_are_counted_together(kernel, make_request, reference, error_of, bits):
    """32 groups of 8 channels: each alone may be rounded in one layer, and their errors come to 1.1e-4."""
    request = make_request(
        nbits_k=bits, nbits_v=8, head_dim=256, value_dim=32, q_group_size=8, axis_key="per_token",
        axis_value="per_channel", sharing=16, tokens=300, residual_length=0, offset=0.0,
    )  # fmt: skip
    assert error_of(kernel.attend(replace(request, scaling=0.3)), reference(replace(request, scaling=0.3))) < 5e-5


def test_remainders_do_not_gather_in_one_channel(kernel, make_request, reference, error_of):
    """Codes of 1 bit are -0.5 on average: turning back the rotation would add up 256 errors of one sign, to 2e-5."""
    request = make_request(
        nbits_k=8, nbits_v=1, head_dim=256, tokens=1100, batch=1, sharing=4, q_group_size=64, axis_value="per_channel",
        rotation_v="hadamard",
    )  # fmt: skip
    request = replace(request, scaling=0.06)
    assert error_of(kernel.attend(request), reference(request)) < 6e-6


def fill(side, codes, scale):
    """Give all tokens in the store the same codes, scales and no means."""
    for segment in side.store.segments:
        for name, part in segment.parts.items():
            part.fill_(codes if name.startswith("codes") else scale if name == "scale" else 0)


@pytest.mark.parametrize("head_dim", [256, 512, 520, 1100])
@pytest.mark.parametrize("codes", [0, 255])
def test_the_largest_sums_do_not_overflow(kernel, make_request, reference, error_of, head_dim, codes):
    """Equal queries and weights, which become 32767, with the codes that are farthest from their half."""
    request = make_request(
        nbits_k=8, nbits_v=8, head_dim=head_dim, tokens=2100, batch=1, heads=1, q_group_size=1024, residual_length=0,
        axis_value="per_channel",
    )  # fmt: skip
    fill(request.pair.key, codes, 0.01)
    fill(request.pair.value, codes, 0.01)
    request.query.fill_(-1.0 if codes else 1.0)
    request.query[:, 1].neg_()
    request = replace(request, scaling=1e-3)
    assert error_of(kernel.attend(request), reference(request)) < ERROR


def test_codes_that_differ_at_every_place(kernel, make_request, reference, error_of):
    """Each column and each row of a block is told from all others, whatever order the columns are summed in."""
    for bits in (1, 2, 4, 8):
        for group in (32, 64, 128):
            request = make_request(
                nbits_k=bits, nbits_v=bits, head_dim=128, tokens=300, batch=1, heads=1, sharing=1, q_group_size=group,
                residual_length=0, axis_value="per_channel",
            )  # fmt: skip
            expected = reference(request)
            for side in (request.pair.key, request.pair.value):
                part = side.store.segments[0].parts[f"codes_{bits}"]
                place = part[0, 0, 0].flatten()[77:78]
                place.bitwise_xor_(1 << (bits - 1))
                assert error_of(kernel.attend(request), reference(request)) < ERROR
                assert error_of(kernel.attend(request), expected) > 0
                place.bitwise_xor_(1 << (bits - 1))


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_a_query_that_is_not_finite_gives_nan_in_its_row_alone(kernel, make_request, reference, number):
    request = make_request(head_dim=64)
    request.query[0, 1, 0, 5] = number
    output = kernel.attend(request)
    assert output[0, 0, 1].isnan().all()
    output[0, 0, 1] = 0
    assert output.isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-25, 1e25, 1e30])
def test_states_of_any_size(kernel, make_request, reference, error_of, magnitude):
    request = make_request(head_dim=64, magnitude=magnitude, metadata_dtype="float32", **DEFAULT_STEPS)
    assert error_of(kernel.attend(request), reference(request)) < ERROR
