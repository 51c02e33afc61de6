"""Codes that are chosen for queries: by the definition, against every choice there is, and where nothing is gained."""

import dataclasses
import gc
import itertools

import pytest
import torch

from kvq import KVQ
from kvq.calibration import Calibration
from kvq.plugin_api import LayerStatistics
from kvq.store.error_feedback import _SHARED, DAMPING, ErrorFeedback, find_weights, rotate_moment
from kvq.store.rotation import HadamardRotation

HEADS, DIM = 2, 32


@pytest.fixture(params=["", "eager"], ids=["C where it can", "torch"], autouse=True)
def way(request, monkeypatch):
    """What quantizes."""
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", request.param)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_moment(heads=HEADS, dim=DIM, seed=1):
    """Second moments of queries whose channels go together, some large and some small."""
    queries = draw(heads, 200, dim, seed=seed) @ draw(heads, dim, dim, seed=seed + 1)
    queries = queries * torch.linspace(0.2, 3, dim)
    return queries.mT @ queries / 200


def statistics_of(moment):
    heads, dim = moment.shape[:2]
    mean = torch.zeros(heads, dim)
    return LayerStatistics(torch.eye(dim).repeat(heads, 1, 1), mean, mean - 4, mean + 4, moment)


def calibration_of(moment):
    return Calibration({(0, "key"): statistics_of(moment)})


def build(moment, rounding="error_feedback", **fields):
    fields = {
        "nbits_k": 4,
        "nbits_v": fields.get("nbits_k", 4),
        "q_group_size": 32,
        "residual_length": 0,
        "sink_length": 0,
        **fields,
    }
    calibration = calibration_of(moment) if rounding == "error_feedback" else None
    return KVQ(backend="native", rounding_k=rounding, calibration=calibration, **fields)


def stored(moment, keys, rounding, **fields):
    """Return the keys as a cache gives them back."""
    cache = build(moment, rounding, **fields)
    cache.update(keys, keys, 0)
    return cache.materialize(0)[0]


def cost(moment, errors):
    """The squared scores that errors `[B, H, T, D]` make, by the definition."""
    return torch.einsum("bhti,hij,bhtj->", errors.double(), moment.double(), errors.double())


def choose(moment, keys, step, bits, rotation=None):
    """Return the codes for keys `[tokens, D]` of one head and levels `step * (code - half)`."""
    cache = build(moment, nbits_k=bits, q_group_size=8)
    cache.update(torch.zeros(1, 1, 8, len(keys[0])), torch.zeros(1, 1, 8, len(keys[0])), 0)
    packed = cache.layers[0].side("key").codec.packed_format
    blocks = keys.mT[None, None, None]
    scale = torch.full(blocks.shape[:4], step)
    return (
        ErrorFeedback(statistics_of(moment), rotation)
        .choose_codes(packed, blocks, scale, torch.zeros_like(scale))[0, 0, 0]
        .mT
    )


def damped(moment):
    return moment + DAMPING * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(moment.shape[-1])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_each_code_is_the_best_if_the_channels_after_it_could_be_anything(bits):
    """Channel by channel, every code is tried, with the later errors set to what costs least, by solving for them."""
    moment, keys, step = draw_moment(1, 6), draw(40, 6, seed=3), 0.9
    own = damped(moment)[0].double()
    order = own.diagonal().argsort(descending=True)
    levels = step * (torch.arange(2**bits).double() - 2 ** (bits - 1))
    codes = choose(moment, keys, step, bits)
    for key, chosen in zip(keys.double(), codes.long(), strict=True):
        errors = torch.zeros(6, dtype=torch.float64)
        for place, channel in enumerate(order):
            done, later = order[:place], order[place + 1 :]
            costs = []
            for level in levels:
                trial = errors.clone()
                trial[channel] = key[channel] - level
                fixed = torch.cat([done, channel[None]])
                trial[later] = -torch.linalg.solve(own[later][:, later], own[later][:, fixed] @ trial[fixed])
                costs.append(trial @ own @ trial)
            assert chosen[channel] == torch.stack(costs).argmin()
            errors[channel] = key[channel] - levels[chosen[channel]]


def test_it_is_near_the_best_of_all_choices():
    """Of 4 ** 5 choices of codes for a token, in the mean over 60 tokens; rounding to nearest is far off."""
    moment, keys, step = draw_moment(1, 5, seed=4), draw(60, 5, seed=3) / 3, 0.5
    own = damped(moment)[0].double()
    every = step * (torch.tensor(list(itertools.product(range(4), repeat=5))).double() - 2)

    def costs(levels):
        errors = keys.double() - levels
        return torch.einsum("...i,ij,...j->...", errors, own, errors)

    best = costs(every[:, None]).amin(0).mean()
    nearest = costs(step * (keys.double() / step).round().clamp(-2, 1)).mean()
    found = costs(step * (choose(moment, keys, step, 2).double() - 2)).mean()
    assert best <= found < 1.1 * best
    assert nearest > 1.5 * best


def test_no_channel_makes_up_for_another_that_no_query_joins():
    moment = torch.diag(torch.linspace(0.5, 4, 8))[None]
    keys = draw(64, 8, seed=5)
    expected = (keys / 0.3).round().clamp(-8, 7) + 8
    assert torch.equal(choose(moment, keys, 0.3, 4).float(), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"metadata_dtype": "int8"},
        {"rotation_k": "none", "balance_k": "none", "clip_k": "none"},
        {"axis_key": "per_token"},
        {"axis_key": "per_token", "q_group_size": 24},
    ],
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scores_are_nearer_than_by_rounding_to_nearest(bits, fields):
    moment, keys = draw_moment(), draw(2, HEADS, 96, DIM, seed=7) * torch.linspace(0.5, 2, DIM)
    errors = {word: stored(moment, keys, word, nbits_k=bits, **fields) - keys for word in ("nearest", "error_feedback")}
    assert cost(moment, errors["error_feedback"]) < (0.9 if bits == 1 else 0.5) * cost(moment, errors["nearest"])


def test_the_moment_is_rotated_as_the_keys_are():
    """The queries themselves are rotated, and their moment taken after it."""
    queries, rotation = draw(1, 300, DIM, seed=8), HadamardRotation(DIM, 5, torch.device("cpu"))
    moved = rotation.apply(queries).double()
    found = rotate_moment(queries.mT @ queries / 300, rotation)
    torch.testing.assert_close(found, moved.mT @ moved / 300, rtol=1e-4, atol=1e-4)


def test_the_stored_lines_are_what_is_made_up_for():
    """Beside a large middle those of others are coarse in bytes; the channel that goes with one makes up for it."""
    moment = torch.eye(DIM).repeat(1, 1, 1)
    moment[0, :2, :2] = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    keys = draw(1, 1, 64, DIM, seed=9)
    keys[..., 2] += 60
    fields = {"metadata_dtype": "int8", "nbits_k": 4, "rotation_k": "none", "balance_k": "none", "clip_k": "none"}
    errors = stored(moment, keys, "error_feedback", **fields) - keys
    plain = stored(moment, keys, "nearest", **fields) - keys
    scores, others = (2 * errors[..., 0] + errors[..., 1]), (2 * plain[..., 0] + plain[..., 1])
    assert scores.square().mean() < 0.3 * others.square().mean()


def test_splits_and_neighbours_leave_no_trace():
    moment, keys = draw_moment(), draw(3, HEADS, 160, DIM, seed=11)
    whole = stored(moment, keys, "error_feedback")
    cache = build(moment)
    for piece in keys.split([1, 40, 7, 112], dim=2):
        cache.update(piece, piece, 0)
    assert torch.equal(cache.materialize(0)[0], whole)
    assert torch.equal(stored(moment, keys[:1], "error_feedback"), whole[:1])


def test_pieces_leave_no_trace(monkeypatch):
    moment, keys = draw_moment(), draw(2, HEADS, 160, DIM, seed=11)
    whole = stored(moment, keys, "error_feedback")
    monkeypatch.setattr("kvq.store.error_feedback.PIECE_ELEMENTS", 1)
    assert torch.equal(stored(moment, keys, "error_feedback"), whole)


def test_a_lost_channel_is_lost_alone():
    keys = draw(1, HEADS, 64, DIM, seed=12)
    keys[0, 0, 40, 7] = torch.inf
    found = stored(draw_moment(), keys, "error_feedback", rotation_k="none", balance_k="none")
    assert found[0, 0, 32:, 7].isnan().all()
    found[0, 0, 32:, 7] = keys[0, 0, 32:, 7] = 0
    assert (found - keys).abs().max() < 2


@pytest.mark.parametrize("size", [0.0, 1e-44, 3e38])
def test_the_ends_of_the_numbers(size):
    keys = draw(1, HEADS, 64, DIM, seed=13).clamp(-1, 1) * size
    found = stored(draw_moment(), keys, "error_feedback", rotation_k="none", metadata_dtype="float32")
    assert found.isfinite().all()
    assert found.abs().max() <= keys.abs().max() * 1.01 + 3e-44  # a step among denormal numbers is rounded up


def test_heads_without_queries_round_to_nearest():
    moment = draw_moment()
    moment[1] = 0
    order, weights = find_weights(moment.double())
    assert torch.equal(weights[1], torch.eye(DIM))
    assert torch.equal(order[1], torch.arange(DIM))
    unknown = dataclasses.replace(statistics_of(moment), query_moment=None)
    _, weights = ErrorFeedback(unknown, None).on(torch.device("cpu"))
    assert torch.equal(weights, torch.eye(DIM).repeat(HEADS, 1, 1))
    keys = draw(1, HEADS, 64, DIM, seed=14)
    fields = {"metadata_dtype": "float32"}
    found, plain = (stored(moment, keys, word, **fields) for word in ("error_feedback", "nearest"))
    torch.testing.assert_close(found[:, 1], plain[:, 1])
    assert not torch.allclose(found[:, 0], plain[:, 0])


def test_caches_share_their_tables_and_leave_none_behind():
    statistics, cpu = statistics_of(draw_moment()), torch.device("cpu")
    rotations = [HadamardRotation(DIM, seed, cpu) for seed in (1, 1, 2)]
    first, same, other = (ErrorFeedback(statistics, rotation).on(cpu)[1] for rotation in rotations)
    assert first is same
    assert not torch.equal(first, other)
    before = len(_SHARED)
    del statistics
    gc.collect()
    assert len(_SHARED) < before
