"""The differences of QuantizedCache in docs/migrating.md, on the transformers that is installed."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import QuantizedCache

GREEDY = dict(max_new_tokens=4, do_sample=False)
SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])


@pytest.fixture
def config():
    return transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )


# quanto's tensors compile an extension when they are read.
@pytest.fixture(params=["hqq", pytest.param("quanto", marks=pytest.mark.costly)])
def filled(config, request):
    """A cache of transformers that holds a prompt of 256 tokens, all of them quantized."""
    torch.manual_seed(0)
    cache = QuantizedCache(request.param, config, nbits=4, q_group_size=64)
    states = torch.randn(2, 1, 256, 64)
    cache.update(states, states, 0)
    return cache, states


def stored(cache):
    layer = cache.layers[0]
    return layer._dequantize(layer._quantized_keys)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_recent_tokens_are_quantized_too(filled):
    cache, states = filled
    assert stored(cache).shape[2] == 256
    assert relative_error(stored(cache)[:, :, -128:], states[:, :, -128:]) > 0.02


def add(cache, tokens, batch=2):
    new = torch.randn(batch, 1, tokens, 64)
    return cache.update(new, new, 0)


def test_a_crop_right_after_the_prompt_raises(filled):
    cache, _ = filled
    with pytest.raises(IndexError):
        cache.crop(-10)


@pytest.mark.case("crop of QuantizedCache", "it reaches the window only, and counts on; ours is right at any depth")
def test_a_later_crop_does_not_reach_what_is_quantized(filled):
    cache, _ = filled
    add(cache, 5)
    assert cache.is_croppable is (Version(transformers.__version__) < Version("5.24"))
    before = stored(cache)
    cache.crop(-10)
    assert torch.equal(stored(cache), before)
    assert cache.get_seq_length() == 261


@pytest.mark.case("reorder_cache of QuantizedCache, as beam search calls it", "its quantized rows stay where they were")
def test_reordering_leaves_the_store_alone(filled):
    cache, _ = filled
    add(cache, 5)
    before = stored(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(stored(cache), before)


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), 4),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    ],
)
def test_another_batch_ends_in_an_error(filled, change, batch):
    cache, _ = filled
    add(cache, 5)
    change(cache)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        add(cache, 1, batch)


@pytest.mark.costly
@pytest.mark.parametrize("filled", ["quanto"], indirect=True)
def test_a_copy_raises(filled):
    with pytest.raises(RuntimeError, match="__deepcopy__"):
        copy.deepcopy(filled[0])


def test_prompt_lookup_raises(config):
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(2, 99, (1, 40), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    options = dict(cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4})
    with pytest.raises(Exception):  # noqa: B017, PT011  # which error depends on the release
        model.generate(prompt, prompt_lookup_num_tokens=4, **options, **GREEDY)


def test_per_channel_wants_whole_groups(config):
    cache = QuantizedCache("quanto", config, nbits=4, axis_key=-1, q_group_size=64)
    states = torch.randn(1, 1, 130, 64)
    with pytest.raises(ValueError, match="Group size"):
        cache.update(states, states, 0)


def test_a_sliding_layer_is_refused(config):
    sliding = transformers.Gemma2Config(num_hidden_layers=2, hidden_size=64, head_dim=64, **SLIDING)
    with pytest.raises((ValueError, NotImplementedError)):
        QuantizedCache("quanto", sliding)


@pytest.mark.parametrize("nbits", [3, 8])
def test_other_bits_are_refused(config, nbits):
    with pytest.raises(ValueError, match="nbits"):
        QuantizedCache("quanto", config, nbits=nbits)


def test_old_tokens_are_quantized_anew(config):
    """hqq along tokens: the groups shift as history grows, and the error of the first tokens grows with it."""
    torch.manual_seed(0)
    cache = QuantizedCache("hqq", config, nbits=4, axis_key=0, axis_value=0, q_group_size=64, residual_length=128)
    states = torch.randn(1, 1, 132, 64)
    cache.update(states, states, 0)
    first = relative_error(stored(cache)[:, :, 4:], states[:, :, 4:])
    for _ in range(7):
        new = torch.randn(1, 1, 129, 64)
        cache.update(new, new, 0)
    later = relative_error(stored(cache)[:, :, 4:132], states[:, :, 4:])
    assert later > 2 * first
