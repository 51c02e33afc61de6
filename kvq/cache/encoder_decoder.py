"""`EncoderDecoderKVQ`, the cache of models that attend to an encoder too."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvq.cache.given_arguments import resolve_config
from kvq.cache.kvq import KVQ
from kvq.cache.snapshot import Restorable
from kvq.config import KVQCacheConfig
from kvq.errors import ModelError
from kvq.layers.devices import move_layers
from kvq.layers.held_bytes import report_memory
from kvq.layers.memory_report import MemoryReport
from kvq.layers.model_layers import DecoderConfig
from kvq.layers.transformers_layers import fork_layer, reset_layer
from kvq.persistence import CacheFile, ModelReference, check_calibration_matches, write_layers


class EncoderDecoderKVQ(EncoderDecoderCache, Restorable):
    """A quantized cache for encoder-decoder models: T5, BART, Whisper.

    Self-attention, which grows with every token, is quantized. Cross-attention holds the encoder's states, as many as
    the input has; with `cross_attention="quantize"` they are quantized too, else they stay in full precision.

    Args:
        config: the configuration, as for `KVQ`.
        model: the model or its configuration.
        padding: tokens of left padding of the decoder's input in each row.
        **overrides: single fields, which win over `config`.

    Raises:
        ConfigError: the configuration is wrong.
        BackendError: the backend is unavailable.
        ModelError: the model is not an encoder-decoder model, or nothing in it would be quantized.

    Example:
        >>> cache = EncoderDecoderKVQ(nbits_k=4, nbits_v=4, model=model)  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        model: PreTrainedModel | PretrainedConfig,
        padding: Sequence[int] | None = None,
        **overrides: Any,
    ) -> None:
        self.config = resolve_config(config, **overrides)
        check_calibration_matches(self.config.calibration, model)
        decoder = DecoderConfig.of(model)
        if not decoder.is_encoder_decoder:
            raise ModelError(f"{type(decoder.layers).__name__} describes no encoder-decoder model; use KVQ")
        own = KVQ.of_decoder(self.config, decoder, padding)
        cross: Cache = DynamicCache()
        if self.config.cross_attention == "quantize":
            # Cross-attention sees the whole input, also in layers whose self-attention slides.
            cross = KVQ.of_decoder(self.config.replace(sliding="quantize"), decoder, bounded=False)
        super().__init__(own, cross)
        self._model = ModelReference(model)

    @property
    def layers(self) -> list[Any]:
        """The layers of the self-attention."""
        layers: list[Any] = self.self_attention_cache.layers
        return layers

    def memory(self) -> MemoryReport:
        """Return the bytes held; the layers of the cross-attention come after those of the self-attention."""
        return report_memory([*self.layers, *self.cross_attention_cache.layers])

    def materialize(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer's self-attention as fresh full-precision tensors `[B, H, T, D]`.

        Raises:
            CacheStateError: the layer holds nothing yet.
        """
        states: tuple[torch.Tensor, torch.Tensor] = self.self_attention_cache.materialize(layer_idx)
        return states

    def save(self, path: str | Path, *, model: PreTrainedModel | PretrainedConfig | None = None) -> None:
        """Write both attentions to a file atomically, as `KVQ.save` does.

        Args:
            path: the file to write, safetensors.
            model: the model whose states these are, for `load` to check; by default that of the constructor.

        Raises:
            CacheFileError: the file cannot be written.
            CacheStateError: the cache is empty, in the middle of a forward, has evicted tokens, or has layers that no
                file can hold.
            ConfigError: a backend was given as an object that no file can name.
        """
        write_layers(
            path,
            self.config,
            self.layers,
            padding=self.self_attention_cache._padding.counts,
            model=model or self._model.find() or self._model_config,
            token_ids=None,
            cross_layers=self.cross_attention_cache.layers,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: PreTrainedModel | PretrainedConfig,
        device: str | torch.device | None = None,
    ) -> EncoderDecoderKVQ:
        """Return the cache that a file holds; nothing in the file is executed. The encoder need not run again.

        Args:
            path: the file to read.
            model: the model that goes on with it; checked against the one whose states were saved.
            device: where the states live; default: where the layers of the model are, or the CPU.

        Raises:
            CacheFileError: the file is damaged, of another kind, newer than this release, or of another model.
            ConfigError, BackendError: the configuration in the file is not available here.
        """
        with CacheFile(path) as file:
            file.check_model(model)
            cache = cls(file.config, model=model, padding=file.header.padding)
            own, cross = cache.self_attention_cache, cache.cross_attention_cache
            own.layers, cross.layers = file.read_layers(own.layers, model, device, cross.layers)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        for one in (own, cross):
            if isinstance(one, KVQ):
                one._padding.settle()
        return cache

    def move_to(self, device: str | torch.device) -> None:
        """Move both attentions to a device; see `KVQ.move_to`."""
        own, cross = move_layers(self.layers, device), move_layers(self.cross_attention_cache.layers, device)
        self.self_attention_cache.layers, self.cross_attention_cache.layers = own, cross

    def fork(self) -> EncoderDecoderKVQ:
        """Return an independent cache with the same tokens; see `KVQ.fork`."""
        other = copy.copy(self)
        other.is_updated = dict(self.is_updated)
        other.self_attention_cache = self.self_attention_cache.fork()
        other.cross_attention_cache = _fork(self.cross_attention_cache)
        return other

    def _take(self, held: Any) -> None:
        self.self_attention_cache, self.cross_attention_cache = held.self_attention_cache, held.cross_attention_cache
        self.is_updated = held.is_updated

    @property
    def _model_config(self) -> PretrainedConfig | None:
        config: PretrainedConfig | None = self.self_attention_cache._model_config
        return config

    def reset(self) -> None:
        """Forget everything; the next update may bring states of another shape."""
        for cache in (self.self_attention_cache, self.cross_attention_cache):
            if isinstance(cache, KVQ):
                cache.reset()
            else:
                for layer in cache.layers:
                    reset_layer(layer)
        for layer_idx in self.is_updated:
            self.is_updated[layer_idx] = False

    def __getitem__(self, index: object) -> NoReturn:
        """Refuse, as `KVQ` does."""
        KVQ.__getitem__(self.self_attention_cache, index)

    def check_dynamic_cache(self, method: str) -> None:
        """Accept every operation: what transformers reserves for its dynamic caches, ours do too."""


def _fork(cross: Cache) -> Cache:
    if isinstance(cross, KVQ):
        return cross.fork()
    other = copy.copy(cross)
    other.layers = [fork_layer(layer) for layer in cross.layers]
    return other
