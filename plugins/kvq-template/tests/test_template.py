"""What a backend should at least prove: it is found, it is as accurate as its bits, and a model generates with it."""

import pytest
import torch
from kvq_template.quantizer import AbsmaxQuantizer

from kvq import KVQ, attach, available_backends
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import sample_recall_batch
from kvq.evaluation.scoring import score_config


def test_it_is_found_under_its_name():
    assert "template" in {backend.name for backend in available_backends()}


@pytest.mark.parametrize("nbits", range(2, 9))
def test_the_error_is_at_most_half_a_step(nbits):
    groups = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale, offset = AbsmaxQuantizer(nbits).encode(groups)
    assert codes.max().item() < 2**nbits
    error = (codes * scale[:, None] + offset[:, None] - groups).abs()
    step = 2 * groups.abs().amax(-1, keepdim=True) / (2**nbits - 2)
    assert (error <= step / 2 * 1.001).all(), "up to the rounding of float32"
    assert (error > step / 4 * 1.001).any(), "one bit more would be claimed"


def test_zeros_stay_zeros():
    codes, scale, offset = AbsmaxQuantizer(4).encode(torch.zeros(2, 64))
    assert torch.equal(codes * scale[:, None] + offset[:, None], torch.zeros(2, 64))


def test_a_model_generates_and_answers():
    model, _ = load_embedded_model()
    batch = sample_recall_batch(4, 100, 8, generator=torch.Generator().manual_seed(5))
    config = KVQ(backend="template", nbits_k=8, nbits_v=8).config
    score = score_config(model, batch, config)
    assert score.memory.layers[0].key.backend == "template"
    assert score.memory.compression > 1.3
    assert score.exact_rate >= 0.9
    with attach(model, backend="template", nbits_k=8, nbits_v=4) as attachment:
        model.generate(batch.context, max_new_tokens=8, do_sample=False)
    assert attachment.cache.memory().packed_bytes > 0
