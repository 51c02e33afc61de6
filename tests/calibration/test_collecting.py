"""The statistics of a model, against those of its own projections, rotated by transformers' own function."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvq import calibrate
from kvq.errors import CalibrationError, ModelError

EXACT = 4
"""Tokens at the beginning of each sequence that caches keep exact."""


def collect_states(model, sequences):
    """Return queries `[B, Hq, T, D]`, keys and values `[B, H, T, D]` of each layer, from the modules themselves."""
    seen = {}

    def watch(index):
        def note(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cosine, sine = kwargs["position_embeddings"]
            heads = [one(hidden).unflatten(-1, (-1, 32)).transpose(1, 2) for one in (module.q_proj, module.k_proj)]
            query, keys = apply_rotary_pos_emb(*heads, cosine, sine)
            seen[index] = query, keys, module.v_proj(hidden).unflatten(-1, (-1, 32)).transpose(1, 2)

        return note

    handles = [
        layer.self_attn.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(sequences)
    for handle in handles:
        handle.remove()
    return seen


def moment(states):
    """The mean of x x^T of `[B, H, T, D]`, head by head, in double."""
    heads = states[:, :, EXACT:].transpose(0, 1).flatten(1, 2).double()
    return torch.stack([rows.T @ rows / len(rows) for rows in heads]).float()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_they_are_those_of_the_states(model, sequences, batch_size):
    found = calibrate(model, sequences, batch_size=batch_size)
    assert found.layers == [0, 1]
    assert found.tokens == 3 * (60 - EXACT)
    for layer_idx, (query, keys, values) in collect_states(model, sequences).items():
        by_head = query.unflatten(1, (2, 3))  # heads that share one follow each other
        expected = {"key": keys, "value": values}
        for side, states in expected.items():
            own, later = found.get(layer_idx, side, 2, 32), states[:, :, EXACT:]
            torch.testing.assert_close(own.second_moment, moment(states), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(own.mean, later.mean((0, 2)), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(own.minimum, later.amin((0, 2)), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(own.maximum, later.amax((0, 2)), rtol=1e-5, atol=1e-6)
            centred = later - later.mean((0, 2), keepdim=True)
            covariance = torch.einsum("bhti,bhtj->hij", centred, centred) / found.tokens
            torch.testing.assert_close(own.covariance, covariance, rtol=1e-3, atol=1e-5)
        shared = torch.stack([moment(by_head[:, :, place]) for place in range(3)]).mean(0)
        torch.testing.assert_close(found.get(layer_idx, "key", 2, 32).query_moment, shared, rtol=1e-4, atol=1e-6)
        assert found.get(layer_idx, "value", 2, 32).query_moment is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_gets_its_attention_back(model, sequences, implementation):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        before = model(sequences).logits
    calibrate(model, sequences)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(sequences).logits, before)


def fail(*_):
    raise RuntimeError("on its way")


def test_it_gets_it_back_where_reading_fails(model):
    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on its way"):
        calibrate(model, torch.ones((1, 10), dtype=torch.int64))
    assert model.config._attn_implementation == "sdpa"


def test_its_numbers_serve_where_gradients_flow(calibration):
    weight = torch.ones(2, 32, requires_grad=True)
    (weight * calibration.get(0, "key", 2, 32).maximum).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("shape", [(2, EXACT), (0, 10), (10,)])
def test_too_little_text_is_refused(model, shape):
    with pytest.raises(CalibrationError, match="each longer than 4"):
        calibrate(model, torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("sequences", "told"),
    [
        ([[1, 2, 3]], "sequences are list"),
        (None, "sequences are NoneType"),
        (torch.rand(2, 10), "sequences are torch.float32"),
        (torch.full((2, 10), 10_000), "tokens from 10000 to 10000"),
        (torch.arange(-1, 9)[None], "tokens from -1 to 8"),
    ],
)
def test_what_is_no_text_of_the_model_is_refused(model, sequences, told):
    with pytest.raises(CalibrationError, match=told):
        calibrate(model, sequences)


@pytest.mark.parametrize("model", [None, "smollm2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model, sequences):
    with pytest.raises(ModelError, match="is not a model of transformers"):
        calibrate(model, sequences)


@pytest.mark.parametrize("size", [0, 1.5, None, True])
def test_a_batch_of_no_whole_number_is_refused(model, sequences, size):
    with pytest.raises(CalibrationError, match=f"batch_size={size} "):
        calibrate(model, sequences, batch_size=size)


def test_states_that_are_not_finite_are_refused(model, sequences):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="values of layer 1 are not finite"):
        calibrate(model, sequences)


def test_a_model_with_an_encoder_is_refused(sequences):
    sizes = dict(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="encoder and a decoder"):
        calibrate(T5ForConditionalGeneration(T5Config(**sizes)), sequences)
