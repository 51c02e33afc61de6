"""Decoding steps of a whole model as one CUDA graph: by Triton's interpreter, and left out where there is no GPU."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from optional_triton import needs_triton
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQ, attach
from kvq.attaching import decode_graph
from kvq.attaching.decode_graph import DecodeGraph, is_plain_step
from kvq.attaching.wait_finder import WaitFinder
from kvq.errors import CacheStateError
from kvq.transformers_seams.private_names import find_cache, pass_cache

SCRIPT = Path(__file__).with_name("interpreted_decode_graph.py")


@needs_triton
@pytest.mark.costly
def test_replayed_steps_are_those_of_the_model_by_itself():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KVQ_ATTENTION_KERNEL": "eager"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    steps = seen["steps"]
    assert steps["error"] <= 1e-3
    assert steps["same"], "the first layer holds what one without graphs holds"
    assert (steps["replays"], steps["recordings"]) == (77, 2), "all but the first and two flushes, the second of which"
    assert steps["recordings after the rows changed places"] == 3
    assert steps["obstacles"] == ["None"]
    assert steps["error after a step back"] <= 1e-3
    assert all(seen[name]["same"] for name in ("plain", "padded", "hidden", "beams"))
    assert seen["plain"]["graph"] == [37, 1, None]
    assert seen["padded"]["graph"] == [0, 0, "the batch is padded"]
    assert seen["hidden"]["graph"] == [0, 0, "the mask hides tokens"]
    assert seen["beams"]["graph"][:2] == [0, 3], "no other is tried once three were of no use"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=300, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(("argument", "plain"), [("tokenizer", True), ("output_attentions", False)])
def test_what_a_step_may_be_given(monkeypatch, argument, plain):
    monkeypatch.setattr("kvq.attaching.decode_graph.DEVICE_TYPE", "cpu")
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    assert is_plain_step({"input_ids": tokens, "position_ids": tokens, argument: object()}) is plain


def test_without_a_gpu_generate_is_as_ever(model):
    tokens = torch.arange(100)[None] % 300
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    texts = []
    for cuda_graphs in (True, False):
        with attach(model, backend="native", residual_length=32, cuda_graphs=cuda_graphs) as attached:
            texts.append(model.generate(tokens, **options).tolist())
        assert attached.decode_graph is None
    assert texts[0] == texts[1]


def test_the_forward_of_an_attached_model_keeps_its_signature_and_is_given_back(model):
    own = inspect.signature(model.forward)
    with attach(model, backend="native", cuda_graphs=True):
        assert inspect.signature(model.forward) == own
        assert "forward" not in vars(copy.deepcopy(model))
    assert "forward" not in vars(model)


@torch.no_grad()
def test_a_step_that_another_kernel_reads_is_not_recorded(model):
    model.set_attn_implementation("kvq")
    cache, tokens = KVQ(backend="native", residual_length=32), torch.arange(100)[None] % 300
    model(tokens, use_cache=True, **pass_cache(model, cache))
    graph = DecodeGraph(model, cache, record=pytest.fail)
    for _ in range(3):
        graph.step(tokens[:, :1])
    assert graph.obstacle.startswith("attention was computed by")
    assert cache.get_seq_length() == 103


@torch.no_grad()
def test_by_default_a_token_comes_behind_all_that_came(model):
    model.set_attn_implementation("kvq")
    cache, tokens = KVQ(backend="native", residual_length=128), torch.arange(100)[None] % 300
    model(tokens, use_cache=True, **pass_cache(model, cache))
    for layer in range(len(cache.layers)):
        cache.evict(layer, torch.arange(60, 100))
    positions = torch.tensor([[100]])
    expected = model(tokens[:, :1], position_ids=positions, **pass_cache(model, cache.fork())).logits
    assert torch.equal(DecodeGraph(model, cache, record=pytest.fail).step(tokens[:, :1]), expected)


@torch.no_grad()
def test_a_layer_that_no_graph_holds_is_named(model):
    model.set_attn_implementation("kvq")
    cache = KVQ(backend="native", layers={0: {"full_precision": True}})
    tokens = torch.arange(100)[None] % 300
    model(tokens, use_cache=True, **pass_cache(model, cache))
    graph = DecodeGraph(model, cache, record=pytest.fail)
    graph.step(tokens[:, :1])
    assert graph.obstacle == "the cache has other layers: DynamicLayer"


@pytest.mark.parametrize(
    "error", [AttributeError("'StepStates' object has no attribute 'shape'"), RuntimeError("capture")]
)
@torch.no_grad()
def test_a_step_that_cannot_be_recorded_is_run_as_ever(model, error, monkeypatch):
    monkeypatch.setattr(decode_graph, "READER", "eager")
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "eager")
    model.set_attn_implementation("kvq")
    tokens, recordings = torch.arange(100)[None] % 300, []

    def forward(**given):
        if not isinstance(find_cache(given), KVQ):
            recordings.append(given)
            raise error
        return own(**given)

    own, logits = model.forward, []
    forward.__signature__ = inspect.signature(own)
    for given in (forward, None):
        cache = KVQ(backend="native", residual_length=32)
        model(tokens, use_cache=True, **pass_cache(model, cache))
        graph = DecodeGraph(model, cache, forward=given)
        logits.append([graph.step(tokens[:, place : place + 1]) for place in range(5)])
        if given:
            assert graph.obstacle == str(error)
    assert len(recordings) == 1
    assert all(map(torch.equal, *logits))


@pytest.mark.parametrize(
    ("waits", "run"),
    [
        (True, lambda x: x.sum().item()),
        (True, lambda x: bool((x > 0).all())),
        (True, lambda x: x.nonzero()),
        (True, lambda x: x[x > 0]),
        (True, lambda x: x.index_put((x > 0,), torch.zeros(()))),
        (True, lambda x: torch.unique(x)),
        (False, lambda x: torch.where(x > 0, x, 0).softmax(-1) @ x.T),
        (False, lambda x: x[torch.tensor([0, 1])].to(torch.float64)),
    ],
)
def test_what_waits_for_the_device_is_found_before_it_is_recorded(waits, run):
    states = torch.randn(3, 4)
    found = pytest.raises(CacheStateError, match="waits for the device: aten::") if waits else nullcontext()
    with found, WaitFinder("cpu"):
        run(states)


def test_a_copy_to_another_device_is_found():
    with pytest.raises(CacheStateError, match="copies from one device to another"), WaitFinder("meta"):
        torch.ones(2).to("meta")


@torch.no_grad()
@pytest.mark.parametrize("hidden", [0, 1])
def test_a_mask_that_hides_tokens_is_no_plain_step(model, hidden):
    model.set_attn_implementation("kvq")
    tokens, mask = torch.arange(100)[None] % 300, torch.ones(1, 101, dtype=torch.long)
    mask[0, 40 : 40 + hidden] = 0
    cache = KVQ(backend="native", residual_length=32)
    model(tokens, use_cache=True, **pass_cache(model, cache))
    graph = DecodeGraph(model, cache, record=pytest.fail)
    output = model(tokens[:, :1], use_cache=True, **pass_cache(model, cache))
    graph.prepare(tokens[:, :1], torch.full((1, 1), 100), output, mask)
    assert (graph.obstacle == "the mask hides tokens") == bool(hidden)


@torch.no_grad()
def test_a_padded_cache_wants_the_model_itself(model):
    model.set_attn_implementation("kvq")
    tokens, mask = torch.arange(200).view(2, 100) % 300, torch.ones(2, 100, dtype=torch.long)
    mask[1, :7] = 0
    cache = KVQ(backend="native", residual_length=32)
    model(tokens, attention_mask=mask, use_cache=True, **pass_cache(model, cache))
    with pytest.raises(CacheStateError, match="takes no mask"):
        DecodeGraph(model, cache).step(tokens[:, :1])


def test_a_model_goes_with_its_attachment(model):
    """Nothing keeps the forward that stands in for the model's own."""
    attached = attach(model, backend="native", cuda_graphs=True)
    pass_cache(model, None)
    kept = weakref.ref(attached)
    attached.detach()
    del attached
    gc.collect()
    assert kept() is None
