"""Random texts for the small model that tuning is tested on, and how many layers it has."""

from __future__ import annotations

import torch

from kvq.evaluation.quality.text import TokenText

LAYERS = 4
LENGTH = 164


def make_text(seed, sequences=2, length=LENGTH):
    tokens = torch.randint(199, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return TokenText(f"noise {seed}", tokens, torch.ones(length, dtype=torch.bool))
