"""Steps of a whole model at fixed addresses by Triton's interpreter, beside steps without them; prints what was seen.

A process of its own with TRITON_INTERPRET=1, since that is read when the programs are imported. In the place of a CUDA
graph stands the function that it would record.
"""

from __future__ import annotations

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQ, attach
from kvq.attaching import decode_graph, recorded_cache
from kvq.attaching.decode_graph import DecodeGraph
from kvq.transformers_seams.private_names import pass_cache

PROMPT, STEPS = 150, 80


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=300, initializer_range=0.2, attn_implementation="kvq",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def run_beside_plain_steps(model):
    tokens = torch.randint(300, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    caches = [KVQ(backend="native", nbits_k=4, nbits_v=4, residual_length=32) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :PROMPT], use_cache=True, logits_to_keep=1, **pass_cache(model, cache))
    graph, errors, obstacles = DecodeGraph(model, caches[0]), [], set()
    for place in range(PROMPT, PROMPT + STEPS):
        token = tokens[:, place : place + 1]
        expected = model(token, use_cache=True, **pass_cache(model, caches[1])).logits
        errors.append(((graph.step(token) - expected).abs().max() / expected.abs().max()).item())
        obstacles.add(graph.obstacle)
    first = [cache.layers[0].materialize() for cache in caches]
    same = [own.equal(other) for own, other in zip(*first, strict=True)]
    counts = {"replays": graph.replays, "recordings": graph.recordings}
    caches[0].reorder_cache(torch.tensor([1, 0]))
    graph.step(tokens[:, :1])
    counts["recordings after the rows changed places"] = graph.recordings
    counts["error after a step back"] = step_back(model, graph, tokens)
    return {"error": max(errors), "same": all(same), "obstacles": sorted(map(str, obstacles)), **counts}


def step_back(model, graph, tokens):
    """The cache gets other layers then."""
    cache, token = graph.cache, tokens[:, :1]
    snapshot = cache.snapshot()
    expected = [graph.step(token) for _ in range(3)]
    cache.restore(snapshot)
    again = [graph.step(token) for _ in range(3)]
    assert cache.get_seq_length() == PROMPT + STEPS + 4
    return max((one - other).abs().max().item() for one, other in zip(again, expected, strict=True))


def generate(model, *, cuda_graphs, padding=0, hidden=0, **options):
    tokens = torch.randint(1, 300, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    mask[0, 60 : 60 + hidden] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **options}
    with attach(model, backend="native", residual_length=32, cuda_graphs=cuda_graphs) as attached:
        texts = model.generate(tokens, **options)[:, PROMPT:].tolist()
    graph = attached.decode_graph
    return texts, None if graph is None else (graph.replays, graph.recordings, graph.obstacle)


def main():
    recorded_cache.LEAST_ROOM = 64  # outgrown by the second flush
    # The kernel that computes the other steps, and the device, on the processor.
    decode_graph.READER, decode_graph.DEVICE_TYPE = "eager", "cpu"
    decode_graph.record_cuda_graph = lambda run, device: run
    model = make_model()
    seen = {"steps": run_beside_plain_steps(model)}
    cases = {
        "plain": {},
        "padded": {"padding": 9},
        "hidden": {"hidden": 30},
        "beams": {"num_beams": 2, "max_new_tokens": 12},
    }
    for name, options in cases.items():
        texts, graph = generate(model, cuda_graphs=True, **options)
        seen[name] = {"same": texts == generate(model, cuda_graphs=False, **options)[0], "graph": graph}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
