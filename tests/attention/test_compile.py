"""`torch.compile(model)` with a quantized cache: the numbers of eager, in one graph that serves all steps."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kvq import KVQ, attach
from kvq.attention.traced.deferred import DeferredPair
from kvq.attention.traced.ticket import Ticket, find_taker
from kvq.errors import CacheStateError

OPTIONS = dict(nbits_k=4, nbits_v=4, q_group_size=32, residual_length=16)


@pytest.fixture(autouse=True)
def compile_from_the_beginning():
    torch._dynamo.reset()
    counters.clear()


def make(name="llama", **fields):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3, eos_token_id=None, pad_token_id=0, **fields,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvq")
    return model.eval().requires_grad_(False)


@pytest.fixture
def llama():
    return make()


def draw_ids(count):
    return torch.randint(97, (1, count), generator=torch.Generator().manual_seed(1))


def compare_steps(compiled, model, steps, prompt=90, tolerance=1e-4, **more):
    """Feed the same tokens to both; return the likeliest next tokens, and the cache of the compiled one."""
    ours, plain = KVQ(model=model, **OPTIONS, **more), KVQ(model=model, **OPTIONS, **more)
    ids, found, expected = draw_ids(prompt + steps), [], []
    with torch.no_grad():
        for start, stop in ((0, prompt), *((place, place + 1) for place in range(prompt, prompt + steps))):
            logits = compiled(ids[:, start:stop], past_key_values=ours).logits
            reference = model(ids[:, start:stop], past_key_values=plain).logits
            torch.testing.assert_close(logits, reference, rtol=tolerance, atol=tolerance)
            found.append(int(logits[0, -1].argmax()))
            expected.append(int(reference[0, -1].argmax()))
    assert found == expected
    assert len(set(found)) >= 8, "the tokens tell nothing"
    assert ours.get_seq_length() == prompt + steps
    return ours


@pytest.mark.costly
@pytest.mark.parametrize("steps", [pytest.param(2000, marks=pytest.mark.slow), 200])
def test_a_step_is_one_graph_and_no_step_adds_another(llama, steps):
    counter = CompileCounter()
    ours = compare_steps(torch.compile(llama, backend=counter), llama, steps)
    assert ours.layers[0].side("key").store.length >= 32 * (steps // 32), "there were flushes on the way"
    assert not counters["graph_break"]
    # One for the prompt, one for the first length of a step, one for every other.
    assert counter.frame_count == 3


@pytest.mark.costly
def test_the_graphs_of_one_cache_serve_another(llama):
    counter = CompileCounter()
    compiled = torch.compile(llama, backend=counter)
    compare_steps(compiled, llama, 40)
    before = counter.frame_count
    compare_steps(compiled, llama, 40, prompt=70)
    assert counter.frame_count <= before + 1, "the prompt has another length"


@pytest.mark.costly
def test_a_compiler_that_rewrites_graphs_drops_no_step():
    """An operation without effects goes where nobody reads its output."""

    def forward(states, cache):
        attention(states, cache)
        return states + 1

    attention = Touching(lambda keys: keys)
    cache, states = KVQ(model=attention.config, **OPTIONS), torch.randn(1, 2, 90, 32)
    with torch.no_grad():
        torch.compile(forward, backend="aot_eager", fullgraph=True)(states, cache)
    torch.testing.assert_close(cache.materialize(0)[0][:, :, -16:], states[:, :, -16:])


@pytest.mark.costly
@pytest.mark.slow
def test_the_default_compiler(llama):
    # It sums in another order, and a state between two codes may then take the other one.
    compare_steps(torch.compile(llama), llama, 40, tolerance=5e-3)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.costly
def test_generate_with_padding(llama):
    """`generate` passes a mask that grows by a token a step."""
    prompts = draw_ids(140).view(2, 70)
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0
    settings = dict(attention_mask=mask, max_new_tokens=60, do_sample=True, top_k=20)
    with attach(llama, OPTIONS):
        torch.manual_seed(1)
        expected = llama.generate(prompts, **settings)
        counter = CompileCounter()
        llama.forward = torch.compile(llama.forward, backend=counter)
        torch.manual_seed(1)
        assert torch.equal(llama.generate(prompts, **settings), expected)
    assert len(expected[:, 70:].unique()) >= 8
    assert not counters["graph_break"]
    assert counter.frame_count <= 3


@pytest.mark.costly
@pytest.mark.parametrize("sliding", ["keep", "quantize"])
def test_layers_that_slide(sliding):
    model = make(
        "gemma3_text", sliding_window=32, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    counter = CompileCounter()
    compare_steps(torch.compile(model, backend=counter), model, 60, sliding=sliding)
    assert not counters["graph_break"]
    assert counter.frame_count <= 4


class Touching(nn.Module):
    """An attention that does something of its own with the keys that the cache returns."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.config = transformers.LlamaConfig(attn_implementation="kvq")
        self.layer_idx = 0

    def forward(self, states, cache):
        keys, values = cache.update(states, states, 0)
        attend = transformers.AttentionInterface()["kvq"]
        return attend(self, states, self.change(keys), values, None, scaling=0.3)[0]


CHANGES = {
    "shape": lambda keys: keys if keys.shape[2] else None,
    "method": lambda keys: keys.clone(),
    "function": lambda keys: torch.cat([keys], dim=2),
    "operator": lambda keys: (1.0 * keys)[:, :] @ torch.eye(32),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", CHANGES)
def test_other_uses_of_the_keys_break_the_graph_and_change_nothing(name):
    module = Touching(CHANGES[name])
    ours, plain = (KVQ(model=module.config, **OPTIONS) for _ in range(2))
    states = torch.randn(1, 2, 100, 32)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for start, stop in ((0, 90), (90, 91), (91, 92)):
            piece = states[:, :, start:stop]
            torch.testing.assert_close(compiled(piece, ours), module(piece, plain))
    assert ours.get_seq_length() == plain.get_seq_length() == 92


@pytest.mark.costly
def test_gradients_flow_as_without_a_compiler(llama):
    llama.requires_grad_(True)
    compiled = torch.compile(llama, backend="eager")
    weight, found = llama.model.layers[0].self_attn.k_proj.weight, []
    for model in (llama, compiled):
        model(draw_ids(60), past_key_values=KVQ(model=llama, **OPTIONS)).logits.sum().backward()
        found.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(found[1], found[0])
    assert found[0].ne(0).any()


@pytest.mark.costly
def test_export_is_refused_by_both_ways(llama):
    cache = KVQ(model=llama, **OPTIONS)

    class Reading(nn.Module):
        def forward(self, ids):
            return llama(ids, past_key_values=cache).logits

    for strict, reason in ((True, r"`torch\.compiler\.disable\(\)`d function"), (False, r"torch\.export")):
        with torch.no_grad(), pytest.raises(Exception, match=reason):
            torch.export.export(Reading(), (draw_ids(60),), strict=strict)
    assert cache.get_seq_length() == 0


def test_models_whose_layers_share_states_are_compiled_around_the_cache():
    config = transformers.Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2, attn_implementation="kvq")
    states = torch.randn(1, 2, 5, 32)
    with torch.no_grad():
        assert not KVQ(model=config, **OPTIONS)._may_defer(states, states)
        assert KVQ(model=transformers.LlamaConfig(attn_implementation="kvq"))._may_defer(states, states)


def test_each_cache_has_a_ticket_of_its_own():
    cache = KVQ(**OPTIONS)
    others = [cache.fork(), copy.deepcopy(cache), copy.copy(cache).fork()]
    assert [find_taker(one._ticket.number) is one for one in (cache, *others)] == [True] * 4
    assert len({int(one._ticket.number) for one in (cache, *others)}) == 4
    assert not copy.deepcopy(cache._ticket).is_issued, "nor is one that was pickled"


def test_a_ticket_keeps_no_cache_alive():
    cache = KVQ(**OPTIONS)
    number = cache._ticket.number
    del cache
    with pytest.raises(KeyError):
        find_taker(number)


def test_attention_reads_a_pair_once():
    cache = KVQ(**OPTIONS)
    states = torch.randn(1, 2, 5, 32)
    pair = DeferredPair(cache, Ticket.of(cache), states, states, 0)
    keys, values = pair.states()
    assert keys.settle().equal(states)
    assert values.settle().equal(states)
    assert cache.get_seq_length() == 5, "added once"
    attended = DeferredPair(cache, Ticket.of(cache), states, states, 0)
    attended.is_taken = True
    with pytest.raises(CacheStateError, match=r"without torch\.compile"):
        attended.settle()
