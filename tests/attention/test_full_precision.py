"""Attention over plain states: whose arithmetic is used, and that no argument is dropped."""

import copy
import sys
import types

import pytest
import torch
import transformers
from torch import nn

from kvq.attention.entry import attend
from kvq.attention.full_precision import attend_full_precision
from kvq.errors import KVQError

SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
MODELS = {
    "sink logits": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    "softcap": lambda: transformers.Gemma2Config(**SMALL, attn_logit_softcapping=0.5, query_pre_attn_scalar=1),
}


class Bare(nn.Module):
    """A model's attention module; neither this file nor those of its parents have an eager attention."""

    is_causal = True
    num_key_value_groups = 3


def read_plainly(request, module, **options):
    states = request.pair.key.materialize(), request.pair.value.materialize()
    return attend_full_precision(module, request.query, *states, request.mask, scaling=request.scaling, **options)


def altered(request, **fields):
    other = copy.copy(request)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


@pytest.mark.parametrize("name", MODELS)
def test_a_subclass_in_another_file_keeps_the_attention_of_its_parent(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()
    for layer in model.model.layers:
        if name == "sink logits":
            nn.init.constant_(layer.self_attn.sinks, 2.0)
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type(kind.__name__, (kind,), {"__module__": __name__})
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        model.set_attn_implementation("kvq")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_nearest_file_comes_first(request_, monkeypatch):
    for name, number in (("near", 1.0), ("far", 2.0)):
        file = types.ModuleType(name)
        file.eager_attention_forward = lambda *args, number=number, **options: (torch.tensor(number), None)
        monkeypatch.setitem(sys.modules, name, file)
    far = type("Far", (Bare,), {"__module__": "far"})
    near = type("Near", (far,), {"__module__": "near"})
    assert read_plainly(request_, near(), softcap=1.0)[0] == 1
    assert read_plainly(request_, type("User", (far,), {"__module__": "gone"})(), softcap=1.0)[0] == 2


@pytest.fixture
def request_(make_request):
    return make_request()


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("queries", [1, 5])
def test_without_any_the_arguments_are_computed(make_request, reference, error_of, queries, mask):
    logits = torch.linspace(-2, 6, 6)
    given = None
    if mask is not None:
        given = torch.ones(2, 1, queries, 333 + queries, dtype=torch.bool).tril(333)
        given[0, :, :, :41] = False
        given = given if mask == "bool" else torch.zeros(given.shape).masked_fill(~given, -1e9)
    request = make_request(queries=queries, mask=given)
    output, weights = read_plainly(request, Bare(), softcap=3.0, s_aux=logits, output_attentions=True)
    assert error_of(output, reference(altered(request, softcap=3.0, sink_logits=logits))) < 1e-5
    assert error_of(output, reference(altered(request, sink_logits=logits))) > 1e-3
    assert error_of(output, reference(altered(request, softcap=3.0))) > 1e-2
    assert weights.shape == (2, 6, queries, 333 + queries)
    assert weights.sum(-1).max() < 1, "the sink logits have their share"


def test_a_position_bias_is_added(make_request, reference, error_of):
    request = make_request(queries=5)
    bias = torch.randn(1, 6, 5, 338)
    seen = torch.ones(5, 338, dtype=torch.bool).tril(333)
    expected = reference(altered(request, mask=bias.masked_fill(~seen, -torch.inf)))
    assert error_of(read_plainly(request, Bare(), position_bias=bias)[0], expected) < 1e-5
    assert error_of(read_plainly(request, Bare())[0], expected) > 1e-2


def test_what_nobody_knows_is_refused(request_):
    with pytest.raises(KVQError, match=r"Bare passes 'sparsity' to its attention.*eager_attention_forward.*set_attn_"):
        attend(Bare(), request_.query, request_.pair, None, sparsity=0.5)


@pytest.mark.parametrize("option", [{}, {"softcap": 3.0}], ids=["sdpa", "written out"])
def test_causality_by_keyword_wins_over_the_module(make_request, reference, error_of, option):
    request = altered(make_request(queries=5), **option)
    for given, module in ((False, Bare()), (True, Bare())):
        module.is_causal = not given
        output, _ = read_plainly(request, module, is_causal=given, **option)
        assert error_of(output, reference(altered(request, is_causal=given))) < 1e-5
        assert error_of(output, reference(altered(request, is_causal=not given))) > 1e-2
        module.is_causal = given
        assert read_plainly(request, module, is_causal=None, **option)[0].equal(output)


def test_sdpa_on_a_processor_is_given_neighbouring_tokens(monkeypatch):
    """Models hand over transposed views, which SDPA reads more slowly; time is not tested, what it is given is."""
    given = []

    def note(module, query, keys, values, mask, **options):
        given.extend([keys, values])
        return query, None

    monkeypatch.setattr("kvq.attention.full_precision.sdpa_attention_forward", note)
    states = torch.randn(1, 5, 2, 16).transpose(1, 2)
    attend_full_precision(nn.Module(), states, states, states, None)
    assert not states.is_contiguous()
    assert all(one.is_contiguous() and torch.equal(one, states) for one in given)
    assert len(given) == 2
