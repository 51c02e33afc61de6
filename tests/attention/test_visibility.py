"""Which tokens a query sees, and where no mask is needed to say so."""

import pytest
import torch

from kvq.attention.visibility import causally_visible

CPU = torch.device("cpu")


@pytest.mark.parametrize("stop", [1, 7, 8])
def test_no_mask_is_made_of_tokens_that_every_query_sees(stop):
    # Three queries at positions 7, 8 and 9: the first one sees positions 0 to 7.
    assert causally_visible(3, 10, 0, stop, CPU) is None


def test_a_later_token_is_hidden_from_the_queries_before_it():
    assert causally_visible(3, 10, 0, 9, CPU)[0, 0, :, 7:].tolist() == [[True, False], [True, True], [True, True]]
    assert causally_visible(3, 10, 9, 10, CPU)[0, 0].tolist() == [[False], [False], [True]]
