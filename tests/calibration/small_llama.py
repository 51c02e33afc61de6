"""A tiny llama with three query heads for each of two key-value heads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, head_dim=32
)


def build_model(seed=3, **sizes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **sizes})).eval()
