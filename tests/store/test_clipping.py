import math

import pytest
import torch

from kvq import KVQ, KVQCacheConfig
from kvq.layers.steps import CLIP_SHARES
from kvq.store.clipping import clip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_middle_of_the_range_is_kept_and_the_rest_cut():
    groups = torch.tensor([[-5.0, -4.6, 0.0, 3.0, 4.4, 5.0], [10.0, 10.5, 11.0, 11.5, 12.0, 10.05]])
    expected = torch.tensor([[-4.5, -4.5, 0.0, 3.0, 4.4, 4.5], [10.1, 10.5, 11.0, 11.5, 11.9, 10.1]])
    torch.testing.assert_close(clip(groups, 0.9), expected)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e38, 1e-45])
def test_a_constant_group_stays_what_it_is(value):
    groups = torch.full((3, 64), value)
    assert torch.equal(clip(groups, 0.8), groups)


def test_a_range_past_the_largest_number():
    largest = torch.finfo(torch.float32).max
    groups = torch.tensor([-largest, 0.0, largest])
    torch.testing.assert_close(clip(groups, 0.5), torch.tensor([-largest / 2, 0.0, largest / 2]))


def stored(bits, share, backend="native", **fields):
    """States after a cache whose codes are spread over a part of the range, and the states."""
    fields = {"axis_key": "per_channel", "axis_value": "per_channel", "balance_k": "none", "balance_v": "none",
              "rotation_k": "none", "rotation_v": "none", **fields}  # fmt: skip
    cache = KVQ(backend=backend, nbits_k=bits, nbits_v=bits, residual_length=0, sink_length=0, q_group_size=64,
                clip_k=share, clip_v=share, **fields)  # fmt: skip
    states = draw(1, 2, 256, 64, seed=3)
    cache.update(states, states, 0)
    return cache.materialize(0), states


@pytest.mark.parametrize(
    ("backend", "bits"),
    [(name, bits) for name in ("native", "hqq") for bits in (2, 3, 4)] + [("quanto", 2), ("quanto", 4)],
)
def test_codes_are_those_of_the_backend_for_the_narrower_range(backend, bits):
    """Without an optimizer each backend rounds to the nearest of levels between the ends, which are exact."""
    options = {"backend_options": {"hqq": {"optimize": False}}} if backend == "hqq" else {}
    found, states = stored(bits, 0.8, backend, metadata_dtype="float32", **options)
    groups = states.double().unflatten(2, (-1, 64))
    low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
    low, high = low + 0.1 * (high - low), high - 0.1 * (high - low)
    step = (high - low) / (2**bits - 1)
    expected = (low + step * ((groups - low) / step).round().clamp(0, 2**bits - 1)).flatten(2, 3)
    for side in found:
        wrong = (side.double() - expected).abs() > 1e-4  # a number halfway between two codes may go either way
        assert wrong.double().mean() < (0.02 if backend == "hqq" else 1e-3)


def test_few_bits_gain_on_normal_numbers_and_eight_bits_lose():
    """Of 64 normal numbers the least squared error of four levels is that of about two thirds of the range.

    Two levels lie best where the halves of a normal distribution have their means, at 0.8 standard deviations, and the
    largest of 64 numbers at 2.4: a third of the range.
    """

    def error(bits, share):
        found, states = stored(bits, share)
        return (found[0].double() - states).square().mean()

    assert error(1, 0.4) < 0.2 * error(1, "none")
    assert error(2, 0.85) < 0.8 * error(2, "none")
    assert error(3, 0.95) < 0.95 * error(3, "none")
    assert error(8, 0.85) > 5 * error(8, "none")


def shares(**fields):
    cache = KVQ(residual_length=0, sink_length=0, **fields)
    states = draw(1, 1, 64, 64)
    cache.update(states, states, 0)
    return tuple(side.codec.clip_share for _, side in cache.layers[0].sides())


@pytest.mark.parametrize("backend", ["native", "quanto", "hqq"])
def test_auto_is_for_few_bits_that_are_rotated_and_grouped_per_channel(backend):
    fields = {"backend": backend, "nbits_k": 4, "nbits_v": 2}
    assert shares(**fields) == (1.0, CLIP_SHARES[2])
    if backend != "quanto":  # which has no three bits
        assert shares(**{**fields, "nbits_k": 3}) == (CLIP_SHARES[3], CLIP_SHARES[2])
        assert shares(**{**fields, "nbits_v": 1}) == (1.0, 0.4)
    assert shares(**fields, rotation_v="none") == (1.0, 1.0)
    assert shares(**fields, axis_value="per_token", rotation_v="hadamard") == (1.0, 1.0)
    assert shares(**fields, clip_v="none") == (1.0, 1.0)
    assert shares(**fields, clip_k=0.9, rotation_k="none") == (0.9, CLIP_SHARES[2])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1.5, 1, True, "all", math.nan, None])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"clip_k: .* is not accepted: 'auto', 'none', or the part of a group's range"):
        KVQCacheConfig(clip_k=value)


def test_it_stands_in_files(tmp_path):
    config = KVQCacheConfig.from_mapping({"clip_k": 0.9, "layers": {"0": {"clip_v": "none"}}})
    assert config.to_dict()["clip_k"] == 0.9
    assert config.to_dict()["layers"] == {"0": {"clip_v": "none"}}
    (tmp_path / "one.yaml").write_text(config.to_yaml())
    assert KVQCacheConfig.from_file(tmp_path / "one.yaml") == config
