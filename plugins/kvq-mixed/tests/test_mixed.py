"""The contract, the arithmetic of two codes in one element, and who reads it."""

import pytest
import torch
from kvq_mixed.channels import choose_channels, count_wide
from kvq_mixed.plugin import kvq_backend
from kvq_mixed.quantizer import MixedQuantizer

from kvq import KVQ, Calibration
from kvq.cli.reader_facts import list_readers
from kvq.plugin_api import Granularity, LayerStatistics, QuantSpec
from kvq.testing import parametrize_contract

HEADS, HEAD_DIM, LENGTH = 3, 64, 32


@parametrize_contract("mixed")
def test_contract(contract):
    contract()


def statistics(**channels):
    """Those of standard states, but for some channels of head 1."""
    own = LayerStatistics.of_standard_states(HEADS, HEAD_DIM, queries=True)
    for channel, (reach, looked_at) in channels.items():
        place = int(channel[1:])
        own.maximum[1, place], own.minimum[1, place] = reach / 2, -reach / 2
        own.query_moment[1, place, place] = looked_at
    return own


def quantizer(side="key", own=None):
    spec = QuantSpec(
        side=side,
        layer_idx=0,
        nbits=2.25,
        granularity=Granularity.PER_CHANNEL,
        group_length=LENGTH,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        states_dtype=torch.float32,
        metadata_dtype=torch.float16,
        device=torch.device("cpu"),
        seed=0,
        statistics=own,
    )
    return MixedQuantizer(spec)


def restore(found, states):
    out = torch.full_like(states, torch.nan)
    found.decode_into(found.encode(states), out)
    return out


def drawn(tokens=2 * LENGTH):
    return torch.randn(2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def test_wide_channels_have_sixteen_levels_and_others_four():
    states = drawn()
    found = quantizer(own=statistics(c5=(800, 1)))
    wide = choose_channels(statistics(c5=(800, 1)), HEADS, HEAD_DIM)
    restored = restore(found, states).unflatten(2, (-1, LENGTH))
    for head in range(HEADS):
        counts = [
            {len(block.unique()) for block in restored[:, head, ..., channel].flatten(0, 1)}
            for channel in range(HEAD_DIM)
        ]
        for channel, several in enumerate(counts):
            assert max(several) > 8 if channel in wide[head] else several <= {3, 4}


def test_its_levels_are_evenly_spread_between_the_extremes():
    states = drawn(LENGTH)
    found = quantizer()
    wide = choose_channels(None, HEADS, HEAD_DIM)
    restored = restore(found, states)
    low, high = states.amin(2, True), states.amax(2, True)
    steps = torch.full((1, HEADS, 1, HEAD_DIM), 3.0).scatter_(-1, wide[None, :, None], 15.0)
    scale = ((high - low) / steps).half().float()
    expected = low + ((states - low) / scale).round() * scale
    torch.testing.assert_close(restored, expected, rtol=1e-3, atol=2e-3)  # and so are the middles


def test_the_eighth_that_costs_the_scores_most_is_chosen():
    # Ranges of 8 and queries of 1 everywhere else: E[q^2] * range^2 is 64.
    own = statistics(c3=(16, 1), c9=(8, 4), c20=(16, 0.1), c21=(4, 3.9), c40=(7.9, 2), c41=(8, 1.1))
    assert count_wide(HEAD_DIM) == 8
    chosen = choose_channels(own, HEADS, HEAD_DIM)
    assert {3, 9, 40, 41} < set(chosen[1].tolist())
    assert not {20, 21} & set(chosen[1].tolist())
    widest = choose_channels(own, HEADS, HEAD_DIM, by_scores=False)
    assert {3, 20} < set(widest[1].tolist())
    assert not {21, 40} & set(widest[1].tolist())
    assert chosen[0].tolist() == list(range(8))  # all alike: the first ones
    assert [len(set(row.tolist())) for row in choose_channels(None, HEADS, HEAD_DIM)] == [8] * HEADS


@pytest.mark.parametrize("head_dim", [6, 64, 80, 128])
def test_an_eighth_is_wide(head_dim):
    assert choose_channels(None, 2, head_dim).shape == (2, max(1, head_dim // 8))


def test_a_lost_number_takes_its_group_with_it_and_no_other():
    states = drawn()
    states[0, 1, 3, 0] = torch.inf
    states[1, 2, LENGTH, 7] = torch.nan
    lost = restore(quantizer(), states).isnan()
    expected = torch.zeros_like(lost)
    expected[0, 1, :LENGTH, 0] = expected[1, 2, LENGTH:, 7] = True
    assert torch.equal(lost, expected)


def test_a_loaded_cache_reads_by_the_channels_that_it_was_written_with(tmp_path):
    own = statistics(c5=(800, 9))
    calibration = Calibration({(0, side): own for side in ("key", "value")})
    calibration.save(tmp_path / "own")
    cache = KVQ(backend="mixed", calibration=tmp_path / "own", residual_length=0, sink_length=0)
    states = drawn(128)
    cache.update(states, states, 0)
    cache.save(tmp_path / "cache.kvq")
    loaded = KVQ.load(tmp_path / "cache.kvq")
    for side, other in zip(loaded.materialize(0), cache.materialize(0), strict=True):
        assert torch.equal(side, other)


def test_kernels_read_the_codes():
    (row,) = list_readers(kvq_backend())
    assert row["kernels"] == {"compiled": "codes", "triton": "codes", "blockwise": "decoded", "eager": "codes"}
