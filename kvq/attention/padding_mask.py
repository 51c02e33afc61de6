"""The mask function of the "kvq" attention, which also tells a cache of left padding that nobody passed to it.

transformers asks the cache for the size of a mask right before it calls the mask function with the padding mask, and
does both before any layer gets states. It must not know what a cache is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from transformers.masking_utils import sdpa_mask


class PaddingLearner(Protocol):
    """Something that wants to know the padding of the batch."""

    def learn_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Take the padding mask `[B, T]` of the first forward, or None where all tokens are real."""
        ...


def expect_mask(learner: PaddingLearner) -> None:
    """Tell a learner of the next mask that is made in this thread; keeps it alive no longer than others do."""
    if not torch.compiler.is_compiling():
        _EXPECTING.learner = weakref.ref(learner)


def kvq_mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """Return the mask for scaled-dot-product attention, `[B, 1, Tq, Tk]`, or None for plain causal attention.

    Args:
        *args: as for `sdpa_mask`.
        attention_mask: the padding mask `[B, T]`, or None.
        **options: as for `sdpa_mask`.
    """
    if not torch.compiler.is_compiling():
        expecting, _EXPECTING.learner = _EXPECTING.learner, None
        learner = None if expecting is None else expecting()
        if learner is not None:
            learner.learn_padding(attention_mask)
    if options.get("q_length") not in (1, options.get("kv_length")):
        # transformers leaves out the mask of a static cache, which lies at the upper left; ours is at the lower right.
        options["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **options)
    return mask


class _Expecting(threading.local):
    """The cache that was asked for the size of a mask last in this thread."""

    learner: weakref.ref[PaddingLearner] | None = None


_EXPECTING = _Expecting()
