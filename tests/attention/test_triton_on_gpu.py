"""The Triton kernel computes attention on a GPU, without waiting for it. Skipped where there is none."""

from __future__ import annotations

import warnings

import interpreted_triton
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQ, attach
from kvq.attaching.decode_graph import DecodeGraph
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.attention.proving.trial import REFERENCE
from kvq.benchmark.device_proof.correctness import SAMPLES
from kvq.layers.fixed_step import FixedStep
from kvq.transformers_seams.private_names import pass_cache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
HALF = {
    **{f"{bits} bit": {"nbits_k": bits, "nbits_v": bits, "head_dim": 128} for bits in range(2, 9)},
    "defaults": {**interpreted_triton.DEFAULTS, "head_dim": 128},
    "rotated": {"rotation_k": "hadamard", "rotation_v": "hadamard"},
    "balanced": {"axis_value": "per_channel", "balance_k": "rms", "balance_v": "rms"},
    "values per channel": {"axis_value": "per_channel"},
    "keys per token": {"axis_key": "per_token", "head_dim": 128},
    "groups of 32": {"q_group_size": 32, "nbits_v": 4, "head_dim": 128},
    "longer groups of values": {"q_group_size": {"key": 64, "value": 128}, "nbits_v": 4, "head_dim": 128},
    "head dim 80": {"head_dim": 80},
    "head dim 256": {"head_dim": 256, "tokens": 270},
    "padding and several queries": {"batch": 2, "padding": (0, 37), "queries": 3},
}


@pytest.mark.parametrize("name", interpreted_triton.CASES)
def test_every_case_of_the_interpreter(name):
    bound = 1e-3 if name.endswith("float16") else 5e-6
    assert interpreted_triton.measure(interpreted_triton.CASES[name], GPU) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("name", HALF)
def test_half_width(name, dtype, bound):
    """Codes are widened by lines of PTX then, which the interpreter does not run."""
    assert interpreted_triton.measure({**HALF[name], "dtype": dtype}, GPU) <= bound


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_a_trial_and_a_proof_ask_for(sample):
    request = sample.build(GPU)
    if TRITON.why_unsupported(request) is None:
        assert relative_difference(TRITON.attend(request), REFERENCE.attend(request)) <= TOLERANCE[request.query.dtype]


def make_model(**fields):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=500, initializer_range=0.2, **fields,
    )  # fmt: skip
    with GPU:
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("backend", ["native", "quanto", "hqq"])
def test_text_is_that_of_the_reference(backend, monkeypatch):
    model, prompt = make_model(), torch.arange(700, device=GPU)[None] % 500
    texts = []
    for kernel in ("triton", "eager"):
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", kernel)
        with attach(model, backend=backend, nbits_k=4, nbits_v=4) as attached:
            options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 150, "do_sample": False}
            texts.append(model.generate(prompt, **options)[0, 700:].tolist())
            assert attached.cache.layers[0].kernel_cache.last_reader == kernel
    assert len(set(texts[0])) > 8
    assert texts[0] == texts[1]


def test_no_step_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "triton")
    model, cache = make_model(), KVQ(backend="native", nbits_k=4, nbits_v=4)
    model.set_attn_implementation("kvq")
    tokens = torch.arange(830, device=GPU)[None] % 500
    with torch.no_grad():
        model(tokens[:, :700], use_cache=True, logits_to_keep=1, **pass_cache(model, cache))
        waits = [count_waits(model, cache, tokens[:, place : place + 1]) for place in range(700, 830)]
    assert sum(waits[1:]) == 0, "the first step of a kind may compile"
    assert cache.layers[0].kernel_cache.last_reader == "triton"


def count_waits(model, cache, token):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(token, use_cache=True, logits_to_keep=1, **pass_cache(model, cache))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def test_a_graph_holds_a_step_until_the_store_outgrows_its_room():
    """Captured once, replayed over two flushes, beside a layer that takes the same tokens."""
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32)
    generator = torch.Generator(GPU).manual_seed(3)

    def draw(heads, tokens=1):
        return torch.randn(2, heads, tokens, 64, generator=generator, device=GPU, dtype=torch.bfloat16)

    history = draw(2, 300)
    cache.update(history, history, 0)
    layer, twin = cache.layers[0], cache.layers[0].fork()
    query, key, value = draw(8), draw(2), draw(2)
    step = FixedStep(layer, query, 0.125, 1024)
    step.run(query, key, value)  # compiles; nobody notes the token
    step.refresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step.run(query, key, value)
    replays = 0
    for _ in range(140):
        for states, heads in ((query, 8), (key, 2), (value, 2)):
            states.copy_(draw(heads))
        pair = twin.update(key, value, packed=True)[0].pair
        expected = REFERENCE.attend(AttentionRequest(query, pair, None, 0.125))
        if not step.may_run():
            layer.update(key, value, packed=True)
            step.refresh()
            continue
        graph.replay()
        step.note_run()
        replays += 1
        assert relative_difference(output, expected) <= TOLERANCE[torch.bfloat16]
    assert replays >= 137
    for own, other in zip(layer.materialize(), twin.materialize(), strict=True):
        assert own.equal(other)


def read_prompt(model, prompt):
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, model=model)
    model(prompt, use_cache=True, logits_to_keep=1, **pass_cache(model, cache))
    return cache


@torch.no_grad()
def test_a_graph_holds_the_steps_of_a_whole_model(monkeypatch):
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "triton")
    model = make_model()
    model.set_attn_implementation("kvq")
    tokens = torch.randint(500, (2, 850), generator=torch.Generator().manual_seed(1)).to(GPU)
    caches = [read_prompt(model, tokens[:, :700]) for _ in range(2)]
    graph = DecodeGraph(model, caches[0])
    for place in range(700, 850):
        token = tokens[:, place : place + 1]
        expected = model(token, use_cache=True, **pass_cache(model, caches[1])).logits
        assert relative_difference(graph.step(token), expected) <= 5e-3, "but for codes that round the other way"
    assert graph.obstacle is None
    assert graph.recordings == 1
    assert graph.replays >= 146


@pytest.mark.parametrize("backend", ["native", "quanto", "hqq"])
def test_generate_replays_its_steps(backend, monkeypatch):
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "triton")
    model, prompt = make_model(), torch.arange(700, device=GPU)[None] % 500
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 150, "do_sample": False}
    texts = []
    for cuda_graphs in (True, False):
        with attach(model, backend=backend, nbits_k=4, nbits_v=4, cuda_graphs=cuda_graphs) as attached:
            texts.append(model.generate(prompt, **options)[0, 700:].tolist())
            if cuda_graphs:
                assert attached.decode_graph.obstacle is None
                assert attached.decode_graph.replays >= 138
    assert len(set(texts[0])) > 8
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("given", "replays"), [({"num_beams": 2}, False), ({"padded": True}, False), ({"rows": 3}, True)], ids=str
)
def test_generate_is_the_same_where_steps_are_not_replayed(given, replays, monkeypatch):
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "triton")
    model, given = make_model(), dict(given)
    prompt = torch.randint(1, 500, (given.pop("rows", 2), 300), generator=torch.Generator().manual_seed(2)).to(GPU)
    mask = torch.ones_like(prompt)
    if given.pop("padded", False):
        mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, **given}
    texts = []
    for cuda_graphs in (True, False):
        with attach(model, backend="native", nbits_k=4, nbits_v=4, cuda_graphs=cuda_graphs) as attached:
            texts.append(model.generate(prompt, **options)[:, 300:].tolist())
            if cuda_graphs:
                assert (attached.decode_graph.replays > 70) == replays
    assert texts[0] == texts[1]
