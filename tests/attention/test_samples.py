"""The requests that a trial compares a kernel on are of the kinds that they claim to be."""

import pytest
import torch

from kvq.attention.proving.comparison import relative_difference
from kvq.attention.proving.samples import Sample

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_reordered", [False, True])
def test_rows_have_changed_places_where_a_sample_says_so(is_reordered):
    pair = Sample(batch=3, is_reordered=is_reordered).build(CPU).pair
    for view in (pair.key, pair.value):
        rows = {None if segment.rows is None else tuple(segment.rows.tolist()) for segment in view.store.segments}
        assert rows == {(2, 1, 0) if is_reordered else None}


def test_every_chunk_holds_numbers_that_differ():
    """A kernel that is wrong in one chunk alone shows only where something stands in it."""
    pair = Sample().build(CPU).pair
    for view in (pair.key, pair.value):
        assert len(view.store.segments) >= 3
        for segment in view.store.segments:
            used = {name: part[:, :, : segment.used] for name, part in segment.parts.items()}
            assert {name: len(part.unique()) > 1 for name, part in used.items()} == dict.fromkeys(used, True)


def test_sinks_masks_and_logits_are_there_where_a_sample_says_so():
    plain, rich = Sample().build(CPU), Sample(sinks=3, mask="bool", has_logits=True, queries=2).build(CPU)
    assert (plain.mask, plain.sink_logits) == (None, None)
    assert rich.mask.dtype is torch.bool
    assert rich.mask.shape == (1, 1, 2, rich.pair.key.length)
    own = rich.mask[0, 0, :, -2:]
    assert own.tolist()[0] == [True, False]
    assert own[1, 1]
    assert rich.sink_logits.shape == (8,)


def test_nothing_to_compare_differs_by_nothing():
    nothing = torch.tensor([torch.nan, torch.nan])
    assert relative_difference(nothing, nothing) == 0
    assert relative_difference(torch.tensor([1.0, torch.nan]), nothing) == float("inf")
