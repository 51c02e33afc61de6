"""Find the `PreTrainedModel` inside a compiled or adapted model, or say why a cache cannot be attached to it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvq.errors import ModelError
from kvq.transformers_seams.private_names import PREPARE_CACHE


def find_generating_model(model: Any) -> PreTrainedModel:
    """Return the model of transformers within `model` whose `generate` runs.

    Args:
        model: such a model; `torch.compile` of it; or an adapter around it that has `get_base_model()`, as PEFT's have.

    Raises:
        ModelError: there is none, or its `generate` would not use an attached cache.
    """
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise ModelError(
            f"{type(model).__name__} copies a model to several devices, each of which would need a cache of its own; "
            "it does not generate: attach to model.module"
        )
    inner = unwrap_model(model)
    if not isinstance(inner, PreTrainedModel) or not callable(getattr(inner, "generate", None)):
        raise ModelError(f"{type(model).__name__} is not a model of transformers that generates")
    if not hasattr(inner, PREPARE_CACHE):
        raise ModelError(
            f"{type(inner).__name__} generates, but has no {PREPARE_CACHE}, by which kvq attaches: transformers "
            f"{transformers.__version__} has another name for it, or the model a loop of its own; pass "
            "past_key_values=KVQ(model=model) to generate, and please report this"
        )
    if inner.dtype == torch.float64:
        raise ModelError(
            f"{type(inner).__name__} computes in float64, which the cache does not take: convert it by "
            "model.to(torch.float32), or to bfloat16 or float16"
        )
    if not hasattr(inner, "_supports_default_dynamic_cache"):  # DiffusionGemma
        raise ModelError(
            f"{type(inner).__name__} generates by a loop of its own, in which no attached cache takes the place of its "
            "cache: pass past_key_values=KVQ(config, model=model) to generate"
        )
    if not inner._supports_default_dynamic_cache():
        raise ModelError(
            f"{type(inner).__name__} brings a cache of its own kind and takes no other, so nothing would be quantized"
        )
    return inner


def unwrap_model(model: Any) -> Any:
    """Return what a compiled or adapted model is made of; anything else as it is."""
    while not isinstance(model, PreTrainedModel):
        if isinstance(compiled := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = compiled
        elif callable(find := getattr(model, "get_base_model", None)):
            model = find()
        else:
            break
    return model
