"""Generate from a tiny random Llama with the backend that the command line names, on the kvq that is installed.

    python scripts/generate_with.py template

Python puts this folder on the path, not the checkout, so in an environment with wheels the wheels run.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import KVQ
from kvq.registry import get_registry

PROMPT_LENGTH, NEW_LENGTH = 300, 40


def main(backend: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    nbits = get_registry().get_backend(backend).capabilities.nbits
    bits = 4 if 4 in nbits else max(nbits)
    cache = KVQ(model=model, backend=backend, nbits_k=bits, nbits_v=bits, residual_length=64)
    prompt = torch.randint(config.vocab_size, (1, PROMPT_LENGTH))
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=NEW_LENGTH, do_sample=False)
    memory = cache.memory()
    if tokens.shape[1] != PROMPT_LENGTH + NEW_LENGTH or memory.total_bytes >= memory.full_precision_bytes:
        sys.exit(f"{backend}: {tokens.shape[1]} tokens, {memory.total_bytes} of {memory.full_precision_bytes} bytes")
    print(tokens[0, PROMPT_LENGTH:].tolist())
    print(memory)


if __name__ == "__main__":
    main(sys.argv[1])
