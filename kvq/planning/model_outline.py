"""The states that a model gives to its cache, found by running it on torch's meta device, without data.

The configurations of architectures disagree on where head counts and head sizes stand, and some lack them
(latent attention, layers of different sizes, states of linear attention); the model's own code knows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from kvq.errors import ModelError
from kvq.layers.biased_keys import KeyBias, find_biased_keys
from kvq.transformers_seams.private_names import pass_cache

FALLBACK_DTYPE = torch.float32
"""What transformers loads a model in whose configuration names no dtype, unless its checkpoint does."""


@dataclass(frozen=True)
class ModelOutline:
    """A model without weights.

    Attributes:
        name: class of the model.
        layers: the layers of transformers' own cache after one token; all their tensors are on the meta device.
        num_parameters: elements of all parameters, shared ones once.
        weights_bytes: bytes of these parameters in `dtype`.
        dtype: the dtype of the parameters.
        key_biases: the layers whose keys have a bias, of unknown size.
    """

    name: str
    layers: tuple[Any, ...]
    num_parameters: int
    weights_bytes: int
    dtype: torch.dtype
    key_biases: tuple[KeyBias, ...] = ()


def outline_model(model_config: PretrainedConfig, batch: int, dtype: torch.dtype | None = None) -> ModelOutline:
    """Build a model on the meta device and run it on one token of each row.

    Args:
        model_config: the model's configuration; not changed.
        batch: rows (B).
        dtype: the dtype of weights and states; None: that of the configuration.

    Raises:
        ModelError: transformers has no generating model for this configuration, or it does not run without data.
    """
    dtype = dtype or find_dtype(model_config) or FALLBACK_DTYPE
    auto_class = _find_auto_class(model_config)
    try:
        with _quiet(), torch.device("meta"):
            model = auto_class.from_config(copy.deepcopy(model_config), dtype=dtype).eval()
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("batched_mm")  # the other ones ask for the data, or for bfloat16
            layers = _run_one_token(model, batch)
    except Exception as error:  # code of some hundred architectures, which raises anything
        raise ModelError(
            f"{type(model_config).__name__}: the model does not run without weights, so what it caches is not "
            f"known from its configuration alone ({type(error).__name__}: {error}); measure it with cache.memory()"
        ) from error
    parameters = list(model.parameters())
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return ModelOutline(
        name=type(model).__name__,
        layers=layers,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        weights_bytes=num_bytes,
        dtype=dtype,
        key_biases=find_biased_keys(model),
    )


def find_dtype(model_config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype that a configuration names, or None."""
    for config in (model_config, model_config.get_text_config(decoder=True)):
        named = getattr(config, "dtype", None)
        found = getattr(torch, named, None) if isinstance(named, str) else named
        if isinstance(found, torch.dtype):
            return found
    return None


def _find_auto_class(model_config: PretrainedConfig) -> Any:
    known = (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
    )
    for mapping, auto_class in known:
        if type(model_config) in mapping:
            return auto_class
    raise ModelError(
        f"{type(model_config).__name__} belongs to no model of transformers that generates text with a cache; "
        "give the configuration of a causal language model"
    )


def _run_one_token(model: PreTrainedModel, batch: int) -> tuple[Any, ...]:
    config = model.config.get_text_config(decoder=True)
    # With a token for padding, some models look for it in the input, which has no data here.
    for one in (model.config, config):
        one.pad_token_id = None
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, 1, dtype=torch.long), use_cache=True, **pass_cache(model, cache))
    return tuple(cache.layers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says of missing kernels to itself: nothing is computed here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
