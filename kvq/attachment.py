"""Attaching to a model: every `generate` of a model gets a fresh quantized cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attachable import PREPARE_CACHE, find_generating_model
from kvq.attention.attend import ATTENTION_NAME, register_attention
from kvq.cache import KVQ, resolve_config
from kvq.config import KVQCacheConfig
from kvq.encoder_decoder import EncoderDecoderKVQ
from kvq.errors import CacheStateError, ModelError
from kvq.user_warnings import warn_user

_BATCHING = "init_continuous_batching"


def attach(
    model: torch.nn.Module,
    config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
    **overrides: Any,
) -> Attachment:
    """Give every `generate` of `model` a fresh `KVQ` and the attention that reads it.

    An encoder-decoder model gets an `EncoderDecoderKVQ`. A draft model of assisted generation keeps the cache that it
    has by itself, unless it is attached too. Continuous batching (`generate_batch`) is refused meanwhile.

    Takes effect at once and until `detach()`, or the end of a `with` block. A `past_key_values` or
    `cache_implementation` of the user's own wins.

    Args:
        model: a model of transformers that generates, compiled or not, or an adapter of PEFT around one.
        config: as for `KVQ`.
        **overrides: as for `KVQ`.

    Raises:
        ConfigError: the configuration is wrong.
        ModelError: the model does not generate, or nothing in it would be quantized.
    """
    return Attachment(find_generating_model(model), resolve_config(config, **overrides))


class Attachment:
    """A model with a quantized cache; undone by `detach()` or by leaving a `with` block.

    Attributes:
        model: the model of transformers.
        config: the configuration of its caches.
        cache: the cache of the latest `generate`, or None before the first; not that of a draft.
    """

    def __init__(self, model: PreTrainedModel, config: KVQCacheConfig) -> None:
        self.model = model
        self.config = config
        self.cache: KVQ | EncoderDecoderKVQ | None = None
        self._build_cache(None)  # refuses now what could only fail at the first generate
        self._hooks = {PREPARE_CACHE: self._prepare_cache, _BATCHING: self._refuse_batching}
        self._shadowed = {name: vars(model).get(name) for name in self._hooks}
        self._original: Callable[..., Any]
        outer = getattr(self._shadowed[PREPARE_CACHE], "__self__", None)
        # The innermost attachment wins: it goes past the others to what the model does by itself.
        self._original = outer._original if isinstance(outer, Attachment) else getattr(model, PREPARE_CACHE)
        self._attention = [(known, known._attn_implementation) for known in _configs(model)]
        register_attention()
        try:
            model.set_attn_implementation(ATTENTION_NAME)
            for name, hook in self._hooks.items():
                setattr(model, name, hook)
        except BaseException:
            self._restore_attention()
            raise
        self._active = True

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except CacheStateError:
            if kind is None:  # else the error that ends the block is the one to see
                raise

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing.

        Raises:
            CacheStateError: another attachment was made later and is still there; detach that one first.
        """
        if not self._active:
            return
        if vars(self.model).get(PREPARE_CACHE) != self._prepare_cache:
            raise CacheStateError("the model was attached again later; detach in the reverse order")
        for name, shadowed in self._shadowed.items():
            if shadowed is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, shadowed)
        self._restore_attention()
        self._active = False

    def _restore_attention(self) -> None:
        for config, implementation in self._attention:
            config._attn_implementation_internal = implementation

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Let transformers prepare its cache and put ours in the place of a plain one that it made itself."""
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, (Cache, tuple)):
            raise ModelError(
                f"past_key_values={type(given).__name__} does not go with an attached cache, whose attention reads "
                "layers of keys and values; detach first"
            )
        chosen = getattr(generation_config, "cache_implementation", None)
        if given is None and chosen is not None:
            warn_user(
                f"cache_implementation={chosen!r} of the generation config wins over the attached cache: "
                "this generate is not quantized; set it to None to use the attached one"
            )
        result = self._original(generation_config, model_kwargs, *args, **kwargs)
        if given is None and chosen is None and _is_plain(model_kwargs.get("past_key_values")):
            cache = self._build_cache(model_kwargs)
            model_kwargs["past_key_values"] = cache
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()
            else:
                self.cache = cache
        return result

    def _build_cache(self, model_kwargs: Mapping[str, Any] | None) -> KVQ | EncoderDecoderKVQ:
        """Return a cache for a `generate` with these arguments, or for none in particular."""
        mask = "decoder_attention_mask" if self.model.config.is_encoder_decoder else "attention_mask"
        padding = _left_padding((model_kwargs or {}).get(mask))
        kind = EncoderDecoderKVQ if self.model.config.is_encoder_decoder else KVQ
        return kind(self.config, model=self.model, padding=padding)

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Stand in for what every way to continuous batching begins with."""
        del args, kwargs
        raise ModelError(
            "generate_batch and the rest of continuous batching keep pages of full-precision states, in which an "
            "attached cache has no place; call generate, or detach first"
        )


def _is_plain(cache: Any) -> bool:
    """Return whether a cache is the one that transformers makes where nobody asks for another."""
    if type(cache) is EncoderDecoderCache:
        return type(cache.self_attention_cache) is DynamicCache
    return type(cache) is DynamicCache


def _left_padding(attention_mask: object) -> list[int] | None:
    """Return the tokens of left padding in each row of a mask `[B, T]`, or None where there are none."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    padding: list[int] = (attention_mask != 0).int().cumsum(-1).eq(0).sum(-1).tolist()
    return padding if any(padding) else None


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return every configuration whose attention `set_attn_implementation` may change."""
    found: dict[int, PretrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
    return list(found.values())
