"""What the tests of the evaluation share: the embedded model in float32 and a short text of its task."""

from __future__ import annotations

import pytest
import torch

from kvq import KVQCacheConfig
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.quality.candidates import make_candidate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.text import load_dataset

LENGTH = 400


@pytest.fixture(scope="session")
def loaded():
    return load_embedded_model(torch.float32)


@pytest.fixture(scope="session")
def text(loaded):
    return load_dataset("recall-report", loaded[1], sequences=5, length=LENGTH)


@pytest.fixture
def make_plan(loaded, text):
    """Return a function that plans the measuring of configurations, given as fields by label, in steps of 16 tokens."""

    def make(labelled, **sizes):
        candidates = [make_candidate(label, KVQCacheConfig(**fields)) for label, fields in labelled.items()]
        sizes = {"needles": None, "prefill": 128, "step": 16, "batch_size": 2, **sizes}
        return EvaluationPlan(loaded[0], text, candidates, **sizes)

    return make
