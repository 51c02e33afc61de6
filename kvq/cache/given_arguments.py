"""Checks of the arguments that a user gives to a cache, before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kvq.config import KVQCacheConfig
from kvq.config.field_types import find_integer
from kvq.config.presets import expand_preset
from kvq.errors import ConfigError, Fault, ModelError
from kvq.layers.model_layers import DecoderConfig


def resolve_config(
    config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None, **overrides: Any
) -> KVQCacheConfig:
    """Return the configuration that `config` and `overrides` describe.

    The overrides win, and so do the fields of a preset among them.

    Raises:
        ConfigError: a value is wrong, or `config` is of another type.
    """
    if isinstance(config, PretrainedConfig):
        problem = f"{type(config).__name__} describes a model; pass it as `model=`"
        raise ConfigError([Fault(("config",), problem)])
    if isinstance(config, KVQCacheConfig):
        return config.replace(**overrides) if overrides else config
    if isinstance(config, (str, Path)):
        loaded = KVQCacheConfig.from_file(config)
        return loaded.replace(**overrides) if overrides else loaded
    if config is None or isinstance(config, Mapping):
        return KVQCacheConfig.from_mapping({**(config or {}), **expand_preset(overrides)})
    problem = f"{config!r} is not accepted; pass a KVQCacheConfig, a mapping, or the path of a YAML or JSON file"
    raise ConfigError([Fault(("config",), problem)])


def check_padding(padding: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the tokens of left padding in each row, or None where they are not given.

    Raises:
        ConfigError: they are not whole numbers.
    """
    if padding is None:
        return None
    counts = [find_integer(count) for count in padding] if isinstance(padding, Iterable) else [None]
    if any(count is None or count < 0 for count in counts):
        fault = Fault(("padding",), f"{padding!r} is not accepted: tokens of left padding, a whole number for each row")
        raise ConfigError([fault])
    return tuple(count for count in counts if count is not None)


def find_decoder(model: PreTrainedModel | PretrainedConfig) -> DecoderConfig:
    """Return the decoder of a model that has no encoder beside it.

    Raises:
        ModelError: it has one, or is not a model of transformers.
    """
    decoder = DecoderConfig.of(model)
    if decoder.is_encoder_decoder:
        raise ModelError(
            f"{type(decoder.attention).__name__} describes an encoder-decoder model, whose cache is two in one: use "
            "EncoderDecoderKVQ(config, model=model) in its place, or attach(model, config), which does so by itself"
        )
    return decoder
