"""From step to step the compiled kernel writes only what differs; each answer is that of the reference."""

import pytest
import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.compiled.kernel import CompiledKernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.config import KVQCacheConfig
from kvq.layers.quantized_layer import KVQLayer

BATCH, HEADS, SHARING, DIM = 2, 2, 3, 32
KERNEL = CompiledKernel()


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    if (problem := KERNEL.why_unavailable()) is not None:
        pytest.skip(problem)


class Steps:
    """A layer and one token after the other, of which the last decides how the next one is given."""

    def __init__(self, tokens=150, **fields):
        self.generator = torch.Generator().manual_seed(0)
        self.layer = KVQLayer(0, KVQCacheConfig(backend="native", **fields).for_layer(0))
        self.layer.update(self.draw(HEADS, tokens), self.draw(HEADS, tokens))

    def draw(self, heads, tokens, order="heads first"):
        drawn = torch.randn(BATCH, heads, tokens, DIM, generator=self.generator)
        if order == "head dim last but one":
            return drawn.mT.contiguous().mT
        return drawn if order == "heads first" else drawn.transpose(1, 2).contiguous().transpose(1, 2)

    def check(
        self, tokens=1, *, query="heads first", keys="heads first", values="heads first", dtype=None,
        sharing=SHARING, queries=None, **options,
    ):  # fmt: skip
        """Take a step, in which each of the three lies in memory in an order of its own."""
        states = self.draw(HEADS, tokens, keys), self.draw(HEADS, tokens, values)
        handle, _ = self.layer.update(*states, packed=True)
        asked = self.draw(HEADS * sharing, queries or tokens, query).to(dtype or torch.float32)
        mask = options.pop("mask", None)
        if mask is not None:
            mask = mask[..., : handle.shape[2]]
        request = AttentionRequest(asked, handle.pair, mask, **{"scaling": DIM**-0.5, **options})
        expected, found = REFERENCE.attend(request), KERNEL.attend(request)
        bound = 1e-4 if asked.dtype is torch.float32 else 2e-2
        assert (found - expected).abs().max() <= bound * expected.abs().max()


VARIATIONS = {
    "the query lies otherwise": dict(query="tokens first", tokens=2),
    "the keys lie otherwise": dict(keys="tokens first", tokens=2),
    "the values lie otherwise": dict(values="tokens first", tokens=2),
    "the query has to be copied": dict(query="head dim last but one", tokens=2),
    "the keys have to be copied": dict(keys="head dim last but one", tokens=2),
    "the values have to be copied": dict(values="head dim last but one", tokens=2),
    "several tokens": dict(tokens=3),
    "none of which hides another": dict(tokens=2, is_causal=False),
    "fewer queries than tokens": dict(tokens=2, queries=1),
    "more heads that ask": dict(sharing=4),
    "another dtype": dict(dtype=torch.bfloat16),
    "another scaling": dict(scaling=0.5),
    "capped scores": dict(softcap=3.0),
    "logits without values": dict(sink_logits=torch.ones(HEADS * SHARING)),
    "a mask": dict(mask=(torch.arange(400) % 3 > 0)[None, None, None].expand(BATCH, 1, 1, 400)),
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("usual", [dict(), dict(tokens=2)], ids=["one token", "two tokens"])
def test_a_step_that_differs_from_those_around_it(usual, variation):
    if "mask" in variation and usual:
        usual = {}
    steps = Steps()
    for given in (usual, usual, variation, usual, variation, variation, usual):
        steps.check(**given)


def test_through_flushes_and_an_empty_window():
    steps = Steps(tokens=60, residual_length=0)
    for _ in range(2 * 64 + 10):
        steps.check()


def test_sinks_and_changes_of_the_layer_between_steps():
    steps = Steps(sink_length=4)
    for change in (
        lambda layer: layer.crop(-5),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.crop(-70),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    ):
        steps.check()
        steps.check()
        change(steps.layer)
        steps.check()


def test_two_layers_keep_apart():
    one, other = Steps(), Steps(tokens=300)
    for _ in range(3):
        one.check()
        other.check()


@pytest.mark.parametrize("option", ["scaling", "softcap"])
def test_a_number_that_a_model_keeps_in_a_tensor_and_changes_is_read_each_time(option):
    steps = Steps()
    number = torch.tensor(0.3 if option == "scaling" else 5.0)
    for factor in (1.0, 1.0, 0.2):
        number.mul_(factor)
        steps.check(**{option: number})
