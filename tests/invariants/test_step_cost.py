"""A step of decoding does little beside the kernel's own work: operations of torch and calls are counted, not timed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from test_update_cost import counted_calls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kvq import KVQ
from kvq.attention.entry import kvq_attention_forward
from kvq.attention.handle import PackedStates
from kvq.attention.kernels.compiled.kernel import CompiledKernel

HEADS, SHARING, DIM = 2, 3, 64
UPDATE_CALLS = 100
"""Calls of Python and C in an update that quantizes nothing: 78 where this was written, 182 before."""
STEP_CALLS = 190
"""The same with attention: 153 where this was written, 279 before."""


class Operations(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Decoding:
    """One layer of a cache with its defaults, read by the compiled kernel."""

    def __init__(self, tokens, dtype=torch.float32, backend="native"):
        self.config = transformers.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=HEADS * SHARING, num_key_value_heads=HEADS, head_dim=DIM,
            hidden_size=HEADS * SHARING * DIM, vocab_size=9, attn_implementation="kvq",
        )  # fmt: skip
        self.dtype = dtype
        self.cache = KVQ(backend=backend, model=self.config)
        for layer in self.cache.layers:
            layer.kernel_cache.wanted = "compiled"
            self.cache.update(self.draw(HEADS, tokens), self.draw(HEADS, tokens), layer.layer_idx)
        self.module = nn.Module()
        self.module.config = self.config
        self.query, self.token = self.draw(HEADS * SHARING, 1), self.draw(HEADS, 1)

    def draw(self, heads, tokens):
        """Return states as models hand them over: views of what lies token by token."""
        return torch.randn(1, tokens, heads, DIM, dtype=self.dtype).transpose(1, 2)

    def update(self):
        stored = self.cache.layers[0].side("key").store
        states = self.cache.update(self.token, self.token, 0)
        assert isinstance(states[0], PackedStates)
        assert self.cache.layers[0].side("key").store is stored, "something was quantized"
        return states

    def step(self):
        states = self.update()
        options = {"scaling": 0.125, "dropout": 0.0, "sliding_window": None, "position_ids": None}
        return kvq_attention_forward(self.module, self.query, *states, None, **options)


@pytest.fixture
def _needs_the_kernel():
    if (problem := CompiledKernel().why_unavailable()) is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("backend", ["native", "quanto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_copies_keys_and_values_and_does_no_more(dtype, backend):
    decoding = Decoding(200, dtype, backend)
    decoding.update()
    with torch.inference_mode(), Operations() as operations:
        decoding.update()
    assert operations.counts.pop("narrow", 0) + operations.counts.pop("slice", 0) == 2
    assert operations.counts == {"copy_": 2}
    with torch.inference_mode(), counted_calls() as found:
        decoding.update()
    assert found["calls"] <= UPDATE_CALLS


@pytest.mark.usefixtures("_needs_the_kernel")
@pytest.mark.parametrize("tokens", [200, 5000])
def test_a_step_makes_its_output_and_nothing_else(tokens):
    decoding = Decoding(tokens)
    for _ in range(2):
        decoding.step()
    with torch.inference_mode(), Operations() as operations:
        decoding.step()
    assert decoding.cache.layers[0].kernel_cache.last_reader == "compiled"
    assert operations.counts.pop("narrow", 0) + operations.counts.pop("slice", 0) == 2
    assert operations.counts == {"copy_": 2, "new_empty": 1}
    with torch.inference_mode(), counted_calls() as found:
        decoding.step()
    assert found["calls"] <= STEP_CALLS


def test_the_counter_sees_an_operation_and_a_view():
    states = torch.zeros(1, 2, 3, 4)
    with Operations() as operations:
        states.detach()
        states[:, :, 1:]
    assert operations.counts == {"detach": 1, "slice": 1}
