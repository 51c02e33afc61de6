"""The list of what kvq relies on in transformers: every entry holds here, and nothing private is missing from it."""

import ast
import contextlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicSlidingWindowLayer

import kvq
from kvq.transformers_seams import private_names as seams

KVQ = Path(kvq.__file__).parent
CHECKS = {}
TORCHS_OWN = {
    "_C",
    "_base",
    "_cdata",
    "_make_wrapper_subclass",
    "_orig_mod",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_schema",
}
HARNESS_OWN = {"_detect_batch_size"}
"""Private names of torch and of lm-evaluation-harness, which the list does not speak of."""


def checks(name):
    return lambda function: CHECKS.setdefault(name, function)


@checks(seams.PREPARE_CACHE)
def _(llama, prompts):
    seen = []
    original = getattr(llama, seams.PREPARE_CACHE)

    def prepare(generation_config, model_kwargs, *rest):
        before = seams.cache_arguments(model_kwargs)
        result = original(generation_config, model_kwargs, *rest)
        seen.append((generation_config.use_cache, before, list(seams.cache_arguments(model_kwargs).values())))
        return result

    setattr(llama, seams.PREPARE_CACHE, prepare)
    llama.generate(prompts, max_new_tokens=2)
    llama.generate(prompts, max_new_tokens=2, use_cache=False)
    (uses, before, made), (uses_none, _, none) = seen
    assert (uses is not False, before, [type(one) for one in made]) == (True, {}, [DynamicCache])
    assert (uses_none, none) == (False, [])


@checks(seams.START_BATCHING)
def _(llama, prompts):
    def refuse(*_args, **_kwargs):
        raise ZeroDivisionError

    setattr(llama, seams.START_BATCHING, refuse)
    with pytest.raises(ZeroDivisionError):
        llama.generate_batch([[5, 6]])


@checks("_attn_implementation")
def _(llama, prompts):
    seen = []

    def attention(module, query, key, value, mask, **_options):
        seen.append(module.config._attn_implementation)
        return torch.zeros(query.transpose(1, 2).shape), None

    transformers.AttentionInterface.register("seam", attention)
    llama.config._attn_implementation = "seam"
    llama(prompts)
    assert seen == ["seam", "seam"]


@checks(seams.ATTENTION)
def _(llama, _prompts):
    config = transformers.LlavaConfig(text_config=LlamaConfig(), vision_config=transformers.CLIPVisionConfig())
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "eager"
    seams.restore_attention(config, "sdpa")
    assert config._attn_implementation == "sdpa"
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"


@checks("_supports_default_dynamic_cache")
def _(llama, _prompts):
    assert llama._supports_default_dynamic_cache() is True
    assert transformers.XLNetLMHeadModel._supports_default_dynamic_cache() is False


@checks("sub_configs")
def _(llama, _prompts):
    assert llama.config.sub_configs == {}
    assert set(transformers.LlavaConfig.sub_configs) == {"text_config", "vision_config"}


@checks("record_past")
def _(llama, _prompts):
    layer = DynamicSlidingWindowLayer(sliding_window=8)
    states = torch.randn(1, 1, 12, 4)
    layer.activate_past_recording()
    assert layer.record_past is True
    layer.update(states, states)
    layer.crop(-2)
    assert torch.equal(layer.keys, states[:, :, 3:10])


@checks("is_recurrent_states_initialized")
def _(llama, _prompts):
    cache = DynamicCache(config=transformers.Qwen3NextConfig(num_hidden_layers=4))
    layer = cache.layers[0]
    assert not any(layer.is_recurrent_states_initialized.values())
    layer.update_recurrent_state(torch.ones(1, 2, 2))
    assert any(layer.is_recurrent_states_initialized.values())


@checks("recurrent_states")
def _(llama, _prompts):
    layer = DynamicCache(config=transformers.Qwen3NextConfig(num_hidden_layers=4)).layers[0]
    layer.update_conv_state(torch.ones(3, 2, 4))
    layer.update_recurrent_state(torch.ones(3, 2, 2))
    held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    assert {one.shape[0] for one in held if one is not None} == {3}


@checks("indexer_keys")
def _(llama, _prompts):
    layer = DynamicIndexedLayer()
    layer.update_indexer(torch.ones(3, 5, 2))
    before = layer.indexer_keys
    layer.update_indexer(torch.ones(3, 1, 2))
    assert (before.shape, layer.indexer_keys.shape) == ((3, 5, 2), (3, 6, 2))
    assert layer.get_seq_length() == 0


@checks("rope_deltas")
def _(llama, _prompts):
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    vision = dict(depth=1, embed_dim=8, hidden_size=8, num_heads=1)
    config = transformers.Qwen2VLConfig(text_config=dict(num_key_value_heads=1, **small), vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    assert [name for name, module in model.named_modules() if "rope_deltas" in vars(module)] == ["model"]
    assert model.model.rope_deltas is None


@checks("cumulative_length")
def _(llama, _prompts):
    layer = DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.randn(1, 1, 12, 4), torch.randn(1, 1, 12, 4))
    assert layer.cumulative_length == layer.get_seq_length() == 12


@checks("_sliding_window_tensor")
def _(llama, _prompts):
    cache = DynamicCache(config=transformers.MistralConfig(num_hidden_layers=1, sliding_window=8))
    cache.update(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), 0)
    ((_, _, told),) = list(cache)
    assert told is cache.layers[0]._sliding_window_tensor
    assert int(told) == 8


@checks("_hf_hook")
def _(llama, _prompts):
    linear = torch.nn.Linear(2, 2)
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", offload=False))
    assert linear._hf_hook.execution_device == "cpu"
    assert linear._hf_hook.weights_map is None


@checks("eager_attention_forward")
def _(llama, _prompts):
    assert callable(vars(inspect.getmodule(type(llama)))["eager_attention_forward"])


@checks("get_mask_sizes")
def _(llama, prompts):
    order = []

    class Asked(DynamicCache):
        def get_mask_sizes(self, *args, **kwargs):
            order.append("size")
            return super().get_mask_sizes(*args, **kwargs)

        def update(self, *args, **kwargs):
            order.append("update")
            return super().update(*args, **kwargs)

    def mask(*args, attention_mask=None, **kwargs):
        order.append(tuple(attention_mask.shape))

    transformers.AttentionMaskInterface.register("seam", mask)
    transformers.AttentionInterface.register("seam", lambda _module, query, *_args, **_kwargs: (query, None))
    llama.config._attn_implementation = "seam"
    padding = torch.ones_like(prompts)
    padding[0, :5] = 0
    with contextlib.suppress(RuntimeError):  # the query is no output; the order is known by then
        llama(prompts, attention_mask=padding, **seams.pass_cache(llama, Asked(config=llama.config)))
    assert order[:3] == ["size", (2, 300), "update"]


@checks(seams.CHECKPOINTS)
def _(llama, _prompts):
    llama.gradient_checkpointing_enable()
    assert any(getattr(part, seams.CHECKPOINTS, False) for part in llama.modules())


@pytest.mark.parametrize("seam", seams.SEAMS, ids=lambda seam: seam.name)
def test_each_seam_holds(seam, llama, prompts):
    CHECKS[seam.name](llama, prompts)


def test_every_check_has_its_seam():
    names = [seam.name for seam in seams.SEAMS]
    assert sorted(CHECKS) == sorted(names)
    assert all(seam.relied_on for seam in seams.SEAMS)


def names_in(path):
    """Yield every attribute that is read or written, and every string, in the code of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def test_the_list_says_where_each_name_is_used():
    used = {path.relative_to(KVQ).as_posix(): set(names_in(path)) for path in KVQ.rglob("*.py")}
    for seam in seams.SEAMS:
        places = {file for file, names in used.items() if seam.name in names} - {"transformers_seams/private_names.py"}
        assert places == set(seam.used_in) - {"transformers_seams/private_names.py"}, seam.name


def test_no_private_name_is_missing_from_the_list():
    """A private attribute that no file of kvq defines is somebody else's."""
    files = [path for path in KVQ.rglob("*.py") if "triton" not in path.parts]
    defined, read = set(), {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if own and isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    read.setdefault(node.attr, set()).add(path.name)
    foreign = set(read) - defined - {seam.name for seam in seams.SEAMS} - TORCHS_OWN - HARNESS_OWN
    assert {name: read[name] for name in foreign} == {}


class TestNames:
    def test_a_forward_is_given_its_cache(self, llama, prompts):
        cache = DynamicCache(config=llama.config)
        output = llama(prompts, use_cache=True, **seams.pass_cache(llama, cache))
        assert seams.find_cache(output) is cache
        assert cache.get_seq_length() == 300

    def test_the_name_of_a_model_wins_over_that_of_the_release(self):
        class Old(torch.nn.Module):
            def forward(self, input_ids, past_key_values=None):
                return past_key_values

        class Wrapped(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return kwargs

        assert seams.pass_cache(Old(), 5) == {"past_key_values": 5}
        newest = next(iter(seams.pass_cache(Wrapped(), 5)))
        assert newest in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

    def test_a_cache_is_found_in_arguments_and_outputs(self):
        cache = DynamicCache()
        for name in seams.CACHE_NAMES:
            assert seams.find_cache({"input_ids": 1, name: cache}) is cache
            assert seams.find_cache(type("Output", (), {})()) is None
            holder = PreTrainedModel.__new__(PreTrainedModel)
            object.__setattr__(holder, name, cache)
            assert seams.find_cache(holder) is cache
        assert seams.find_cache(torch.ones(1)) is None
        assert seams.find_cache((1, 2)) is None

    def test_the_arguments_of_generate_are_renamed(self):
        (known,) = seams.rename_cache({"cache": 1})
        assert seams.rename_cache({"past_key_values": 1, "use_cache": True}) == {known: 1, "use_cache": True}
        both = {"cache": 1, "past_key_values": 2}
        assert seams.rename_cache(both) == both, "transformers tells of it"
        assert seams.rename_cache({}) == {}
