"""Attaching to a model: each `generate` gets a fresh quantized cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attaching.attention_switch import AttentionSwitch
from kvq.attaching.decode_graph import DecodeGraph, is_plain_step
from kvq.attaching.evicted_start import check_start
from kvq.attaching.generation_watch import GenerationWatch
from kvq.attaching.unwrap import find_generating_model
from kvq.cache.encoder_decoder import EncoderDecoderKVQ
from kvq.cache.given_arguments import resolve_config
from kvq.cache.kvq import KVQ
from kvq.cache.padding import left_padding
from kvq.config import KVQCacheConfig
from kvq.errors import CacheStateError, ModelError
from kvq.layers.biased_keys import explain_biased_keys, find_biased_keys
from kvq.layers.quantized_layer import KVQLayer
from kvq.plugin_api.granularity import Granularity
from kvq.transformers_seams.private_names import (
    ATTENTION,
    PREPARE_CACHE,
    START_BATCHING,
    cache_arguments,
    find_cache,
    rename_cache,
)
from kvq.user_warnings import warn_user


def attach(
    model: torch.nn.Module,
    config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    cuda_graphs: bool = False,
    **overrides: Any,
) -> Attachment:
    """Give every `generate` of `model` a fresh `KVQ` and the attention that reads it.

    An encoder-decoder model gets an `EncoderDecoderKVQ`. A draft model of assisted generation keeps the cache that it
    has by itself, unless it is attached too. Continuous batching (`generate_batch`) is refused meanwhile.

    Takes effect at once and until `detach()`, or the end of a `with` block. A cache that you pass to `generate` is left
    alone, and a `cache_implementation` wins. Where a `generate` does not read the attached cache for any other reason,
    a warning says so, once, and `Attachment.cache` is None. A forward outside of `generate` takes the cache that you
    pass to it. Copies of the model (`copy.deepcopy`, `pickle`, `torch.save`) are not attached.

    Args:
        model: a model of transformers that generates, compiled or not, or an adapter of PEFT around one.
        config: as for `KVQ`.
        cuda_graphs: replay the steps of decoding between flushes as one CUDA graph, where the model is on a CUDA device
            and the batch has no padding. `Attachment.decode_graph` says how many, and why not.
        **overrides: as for `KVQ`.

    Raises:
        ConfigError: the configuration is wrong.
        ModelError: the model does not generate, or nothing in it would be quantized.
    """
    return Attachment(find_generating_model(model), resolve_config(config, **overrides), cuda_graphs=cuda_graphs)


class Attachment:
    """A model with a quantized cache; undone by `detach()` or by leaving a `with` block.

    Attributes:
        model: the model of transformers.
        config: the configuration of its caches.
        cache: the cache of the latest `generate`, also where the model drafts for another one, or where you passed a
            `KVQ` yourself; None before the first, and where the latest one did not read a quantized cache. A model that
            drafts for itself shows the cache of its own `generate`.
        decode_graph: the CUDA graph of the latest `generate`, with `cuda_graphs`; None before its first step.
    """

    def __init__(self, model: PreTrainedModel, config: KVQCacheConfig, *, cuda_graphs: bool = False) -> None:
        self.model = model
        self.config = config
        self.cache: KVQ | EncoderDecoderKVQ | None = None
        self.decode_graph: DecodeGraph | None = None
        self._is_unrecordable = False
        # A cache is built now, to raise here and not at the first generate.
        _warn_of_biased_keys(model, self._build_cache(None))
        self._hooks: dict[str, Callable[..., Any]] = {
            PREPARE_CACHE: self._prepare_cache,
            START_BATCHING: self._refuse_batching,
            "generate": self._generate,
            "__getstate__": self._state_without_hooks,
            **({"forward": self._signed_forward(model.forward)} if cuda_graphs else {}),
        }
        self._shadowed = {name: vars(model).get(name) for name in self._hooks}
        # The innermost attachment wins: it goes past the others to the model's own methods.
        outer = _attachment_of(vars(model))
        self._own: dict[str, Callable[..., Any]] = (
            outer._own if outer else {name: getattr(model, name) for name in (PREPARE_CACHE, "generate", "forward")}
        )
        self._calls = _Calls()
        self._told: set[str] = set()
        self._attention = AttentionSwitch(model)
        self._attention.turn_on()
        try:
            for name, hook in self._hooks.items():
                setattr(model, name, hook)
        except BaseException:
            self._attention.turn_off()
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
            if vars(self.model).get(name) != self._hooks[name]:
                continue  # another one was put there since
            if shadowed is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, shadowed)
        self._attention.turn_off()
        self._active = False

    @property
    def is_outermost(self) -> bool:
        """Whether this thread is in at most one `generate` of the model; one that drafts for itself is in several."""
        return len(self._calls.stack) <= 1

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own `generate` and find out whether it reads the cache."""
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        check_start(given, given.get("generation_config") or self.model.generation_config)
        watch = GenerationWatch(self.model, self._tell, lambda one: self._calls.stack[-1] is one)
        self._calls.stack.append(watch)
        if self.is_outermost:
            self.cache = self.decode_graph = None
        failed = True
        try:
            watch.begin()
            result = self._own["generate"](*args, **rename_cache(kwargs))
            failed = False
        finally:
            watch.end(failed=failed)
            self._calls.stack.pop()
        return result

    def _signed_forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return the hook with the signature of the model's own forward, by which transformers knows what it takes."""

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        return forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a step of decoding of the attached cache where that is possible; else run the model's own forward."""
        own = self._own["forward"]
        cache: Any = None if args else find_cache(kwargs)
        is_ours = (
            isinstance(cache, KVQ) and cache is self.cache and bool(self._calls.stack) and not self._is_unrecordable
        )
        if not is_ours or torch.compiler.is_compiling() or not is_plain_step(kwargs):
            return own(*args, **kwargs)
        graph = self.decode_graph  # another thread may put its own there at any moment
        if graph is None or graph.cache is not cache:
            graph = self.decode_graph = DecodeGraph(self.model, cache, forward=own)
        tokens, positions = kwargs["input_ids"], kwargs["position_ids"]
        output = graph.replay(tokens, positions)
        if output is None:
            output = own(**kwargs)
            graph.prepare(tokens, positions, output, kwargs.get("attention_mask"))
            self._is_unrecordable = graph.is_hopeless
        return output

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Let transformers prepare its cache, then replace a plain one that it made itself by ours."""
        given = cache_arguments(model_kwargs)
        for name, cache in given.items():
            if not isinstance(cache, (Cache, tuple)):
                raise ModelError(
                    f"{name}={type(cache).__name__} does not go with an attached cache, whose attention reads "
                    "layers of keys and values; detach first"
                )
        result = self._own[PREPARE_CACHE](generation_config, model_kwargs, *args, **kwargs)
        made = {name: cache for name, cache in cache_arguments(model_kwargs).items() if name not in given}
        watch = self._calls.stack[-1] if self._calls.stack else None
        if given:
            own = next(iter(given.values()))
            self._note(watch, own if isinstance(own, (KVQ, EncoderDecoderKVQ)) else None)
            return result
        replaced = [name for name, cache in made.items() if _is_plain(cache)]
        chosen = getattr(generation_config, "cache_implementation", None)
        if chosen is not None or len(replaced) != 1:
            reason = _find_refusal(generation_config, chosen, made)
            if watch is None:
                self._tell(reason)
            else:
                watch.settle(reason)
            return result
        cache = model_kwargs[replaced[0]] = self._build_cache(model_kwargs)
        if isinstance(cache, KVQ):
            cache.is_watched = watch is not None
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        self._note(watch, cache)
        return result

    def _note(self, watch: GenerationWatch | None, cache: KVQ | EncoderDecoderKVQ | None) -> None:
        """Show the cache that a `generate` will read, and have it watched; None where the user has chosen another."""
        self.cache = cache if self.is_outermost else self.cache
        if watch is None:
            return
        if cache is None:
            watch.settle()
        else:
            watch.expect(cache)

    def _tell(self, reason: str) -> None:
        """Warn that a `generate` is not quantized, once for each reason."""
        if self.is_outermost:
            self.cache = None
        if reason not in self._told:
            self._told.add(reason)
            warn_user(f"this generate of {type(self.model).__name__} does not use the attached cache: {reason}")

    def _build_cache(self, model_kwargs: Mapping[str, Any] | None) -> KVQ | EncoderDecoderKVQ:
        """Return a cache for a `generate` with these arguments, or for none in particular."""
        mask = "decoder_attention_mask" if self.model.config.is_encoder_decoder else "attention_mask"
        padding = left_padding((model_kwargs or {}).get(mask))
        kind = EncoderDecoderKVQ if self.model.config.is_encoder_decoder else KVQ
        return kind(self.config, model=self.model, padding=padding)

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse continuous batching; replaces the method with which all its forms begin."""
        del args, kwargs
        raise ModelError(
            "generate_batch and the rest of continuous batching keep pages of full-precision states, in which an "
            "attached cache has no place; call generate, or detach first"
        )

    def _state_without_hooks(self) -> dict[str, Any]:
        """Return the state by which the model is copied and pickled: that of the model as `detach` leaves it."""
        state = dict(vars(self.model))
        while (attachment := _attachment_of(state)) is not None:
            for name, shadowed in attachment._shadowed.items():
                if shadowed is None:
                    del state[name]
                else:
                    state[name] = shadowed
        switched = self._attention.switched()
        return state | {"_attention_before_kvq": [OwnAttention(one.config, one.before) for one in switched]}


class OwnAttention:
    """Copies and pickles as the call that gives a configuration its own attention back, which needs no kvq.

    Args:
        config: the configuration.
        implementation: the attention that it reads without us.
    """

    def __init__(self, config: PretrainedConfig, implementation: str | None) -> None:
        self._arguments = config, ATTENTION, implementation

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, self._arguments


class _Calls(threading.local):
    """Each `generate` of the attached model that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[GenerationWatch] = []


def _attachment_of(attributes: Mapping[str, Any]) -> Attachment | None:
    """Return the innermost attachment among the attributes of a model, or None."""
    holder = getattr(attributes.get(PREPARE_CACHE), "__self__", None)
    return holder if isinstance(holder, Attachment) else None


def _find_refusal(generation_config: Any, chosen: str | None, made: Mapping[str, Any]) -> str:
    """Return why transformers made no plain cache that ours could replace."""
    if chosen is not None:
        return f"cache_implementation={chosen!r} of the generation config wins over it; set it to None"
    if getattr(generation_config, "use_cache", None) is False:
        return "use_cache=False, in the call or in the generation config, asks for no cache at all"
    kinds = ", ".join(sorted(type(cache).__name__ for cache in made.values()))
    return f"transformers made {kinds or 'no cache'}, where a DynamicCache was expected"


def _warn_of_biased_keys(model: PreTrainedModel, cache: KVQ | EncoderDecoderKVQ) -> None:
    """Warn where the cache quantizes keys per token that a bias of the model spreads far apart."""
    settings = {layer.layer_idx: layer.settings for layer in cache.layers if isinstance(layer, KVQLayer)}
    if all(one.key.granularity is Granularity.PER_CHANNEL for one in settings.values()):
        return  # the weights need not be read
    told = explain_biased_keys(find_biased_keys(model), settings)
    if told is not None:
        warn_user(told)


def _is_plain(cache: Any) -> bool:
    """Return whether a cache is the one that transformers makes where nobody asks for another."""
    if type(cache) is EncoderDecoderCache:
        return type(cache.self_attention_cache) is DynamicCache
    return type(cache) is DynamicCache
