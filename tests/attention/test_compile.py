"""`torch.compile(model)` with a quantized cache: same numbers, and no recompilation without end."""

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from kvq import KVQ


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvq").eval()


@pytest.mark.costly
def test_the_graphs_of_the_first_steps_serve_all_later_ones(llama):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(llama, backend=counter)
    options = dict(nbits_k=4, nbits_v=4, q_group_size=32, residual_length=16)
    ours, plain = KVQ(model=llama, **options), KVQ(model=llama, **options)
    ids = torch.arange(90)[None]
    frames = []
    with torch.inference_mode():
        assert compiled(ids, past_key_values=ours).logits.equal(llama(ids, past_key_values=plain).logits)
        for step in range(40):
            token = ids[:, step : step + 1]
            logits = compiled(token, past_key_values=ours).logits
            torch.testing.assert_close(logits, llama(token, past_key_values=plain).logits)
            frames.append(counter.frame_count)
    assert ours.layers[0].side("key").store.length >= 96, "there was a flush on the way"
    assert frames[0] > 0
    # Traced, `update` would add more than a dozen: one or more at each flush.
    assert frames[-1] <= frames[0] + 3, frames
