"""Everything in transformers that kvq relies on and that transformers does not promise.

`SEAMS` lists each private name and each undocumented behaviour, with the files that use it. A test asserts every entry
at each supported version, and fails on a private name that the list lacks. What differs between the supported versions
is bridged here: `generate`, forward and outputs call the cache `past_key_values` before 5.24 and `cache` since. It must
not know what a quantized cache is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from transformers import GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method that makes the cache of a `generate`."""
START_BATCHING = "init_continuous_batching"
"""The method that every way to continuous batching begins with."""
ATTENTION = "_attn_implementation_internal"
"""The attribute of a configuration behind `_attn_implementation`; setting it leaves the sub-configurations alone."""
CHECKPOINTS = "gradient_checkpointing"
"""The attribute of modules that drop the cache of a forward in training mode."""
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names of the cache in `generate`, forward and outputs of the supported versions, the newest first."""


@dataclass(frozen=True)
class Seam:
    """One thing that kvq takes for granted.

    Attributes:
        name: the private name, or the public one whose behaviour is undocumented.
        relied_on: what kvq takes for granted.
        used_in: files below `kvq/` that use the name.
    """

    name: str
    relied_on: str
    used_in: tuple[str, ...]


SEAMS = (
    Seam(
        PREPARE_CACHE,
        "`generate` calls it on the model as (generation_config, model_kwargs, ...) before the first forward that "
        "reads a cache; it puts a new one into `model_kwargs`, and none where `use_cache` is False",
        ("transformers_seams/private_names.py",),
    ),
    Seam(
        START_BATCHING,
        "`generate_batch` and the managers of continuous batching call it on the model",
        ("transformers_seams/private_names.py",),
    ),
    Seam(
        "_attn_implementation",
        "a configuration names in it the attention that its modules call, and each module reads it at every forward",
        (
            "attention/entry.py",
            "cache/kvq.py",
            "transformers_seams/private_names.py",
            "attaching/attention_switch.py",
            "benchmark/setting.py",
        ),
    ),
    Seam(ATTENTION, "where `_attn_implementation` is stored", ("transformers_seams/private_names.py",)),
    Seam(
        "_supports_default_dynamic_cache",
        "returns whether a class takes a `DynamicCache`, and so any other `Cache`",
        ("attaching/unwrap.py",),
    ),
    Seam(
        "sub_configs",
        "names the attributes of a configuration that hold further ones",
        ("attaching/attention_switch.py",),
    ),
    Seam(
        "record_past",
        "layers keep what a later crop may bring back while it is set; assisted decoding clears it at its end",
        (
            "cache/kvq.py",
            "layers/carrying_layer.py",
            "layers/transformers_layers.py",
            "layers/quantized_layer.py",
            "layers/sliding_layer.py",
        ),
    ),
    Seam(
        "is_recurrent_states_initialized",
        "a mapping in which a layer of linear attention says whether it holds a state",
        ("layers/transformers_layers.py", "persistence/carried.py"),
    ),
    Seam(
        "recurrent_states",
        "a mapping of the states of a layer of linear attention, [B, ...]; `conv_states` too",
        ("transformers_seams/layer_kinds.py", "layers/carrying_layer.py", "persistence/carried.py"),
    ),
    Seam(
        "indexer_keys",
        "the keys [B, T, D] of the indexer of a layer of sparse attention, a new tensor after each update",
        (
            "transformers_seams/layer_kinds.py",
            "layers/quantized_layer.py",
            "layers/transformers_layers.py",
            "planning/rehearsal.py",
            "persistence/carried.py",
        ),
    ),
    Seam(
        "rope_deltas",
        "models of the kind of Qwen2-VL keep in it how positions differ from the number of tokens, [B, 1], from the "
        "forward with the images on, and add it to later positions",
        ("transformers_seams/position_offsets.py",),
    ),
    Seam(
        "cumulative_length",
        "a sliding layer counts the tokens that it has seen in it",
        ("persistence/plain_layer.py",),
    ),
    Seam(
        "_sliding_window_tensor",
        "iterating over a `DynamicCache` yields it behind the keys and values of a layer; None where nothing slides",
        ("cache/kvq.py",),
    ),
    Seam(
        "_hf_hook",
        "accelerate keeps by it on which device a module computes and where its weights are",
        ("persistence/fingerprint.py", "transformers_seams/key_projections.py"),
    ),
    Seam(
        "eager_attention_forward",
        "the function of that name in a model's file is the model's own eager attention",
        ("attention/full_precision.py",),
    ),
    Seam(
        "get_mask_sizes",
        "before the layers run, the cache is asked for the size of a mask, and then the mask function is called, with "
        "the padding mask [B, T]",
        ("cache/kvq.py", "tuning/row_layers.py"),
    ),
    Seam(
        CHECKPOINTS,
        "modules where it is set take no cache in training mode, before 5.24 also without gradients",
        ("transformers_seams/private_names.py",),
    ),
)
"""All seams. The outermost layers of the wall come first: what `attach` holds on to."""


def pass_cache(model: Any, states: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to the forward of a model.

    Args:
        model: a model of transformers, or a module around one.
        states: a cache, or None.
    """
    return {name_cache(model.forward): states}


def name_cache(forward: Callable[..., Any]) -> str:
    """Return the name of the argument that hands a cache to a model's forward."""
    function = inspect.unwrap(forward)
    return _name_in(getattr(function, "__func__", function))


def rename_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `generate` with the cache under the name that this release has for it."""
    known = _newest_name()
    given = [name for name in ("cache", "past_key_values") if name in arguments]
    if given == [known] or len(given) != 1:
        return dict(arguments)
    return {known if name in given else name: value for name, value in arguments.items()}


def find_cache(holder: Any) -> Any:
    """Return the cache in the arguments of a forward or in what it or `generate` returned, or None.

    Args:
        holder: a mapping or an object with attributes; other values hold none.
    """
    if isinstance(holder, Mapping):
        # The keys as they are: outputs of 5.24 warn of the old names when they are asked for them.
        names = set(holder.keys())
        return next((holder[name] for name in CACHE_NAMES if name in names), None)
    attributes: Mapping[str, Any] = getattr(holder, "__dict__", {})
    return next((found for name in CACHE_NAMES if (found := attributes.get(name)) is not None), None)


def cache_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are caches, or that stand under one of the names of a cache and are not None."""
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Cache) or (name in CACHE_NAMES and value is not None)
    }


def read_attention(config: PretrainedConfig) -> str | None:
    """Return the attention implementation of a configuration, or None.

    Past `__getattribute__`, which in a configuration of transformers looks a name up in several tables first.
    """
    known: dict[str, Any] = object.__getattribute__(config, "__dict__")
    name: str | None = known[ATTENTION] if ATTENTION in known else getattr(config, "_attn_implementation", None)
    return name


def restore_attention(config: PretrainedConfig, implementation: str | None) -> None:
    """Give a configuration an attention implementation, and no other configuration with it."""
    setattr(config, ATTENTION, implementation)


@lru_cache(maxsize=64)
def _name_in(forward: Callable[..., Any]) -> str:
    """Return the name of the parameter that takes the cache; that of this release where there is none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), _newest_name())


@cache
def _newest_name() -> str:
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in parameters)
