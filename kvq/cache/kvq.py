"""`KVQ`, the quantized cache that `generate` takes as `past_key_values`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvq.attention import ATTENTION_NAME
from kvq.attention import entry as _entry  # noqa: F401  # registers it with transformers
from kvq.attention.attention_detector import AttentionDetector
from kvq.attention.hint import hint_at_attention
from kvq.attention.padding_mask import expect_mask
from kvq.attention.traced.deferred import DeferredPair
from kvq.attention.traced.ticket import Ticket
from kvq.cache.evictable import Evictable
from kvq.cache.given_arguments import check_padding, find_decoder, resolve_config
from kvq.cache.known_tokens import KnownTokens
from kvq.cache.linear_states import CarriedStates
from kvq.cache.merging import merge
from kvq.cache.padding import BatchPadding
from kvq.cache.snapshot import Restorable
from kvq.cache.thread_guard import ThreadGuard
from kvq.cache.token_history import TokenHistory
from kvq.calibration import Calibration
from kvq.config import KVQCacheConfig
from kvq.errors import CacheStateError, ConfigError, Fault, ModelError, StatesError
from kvq.layers.devices import move_layers, reading_ahead
from kvq.layers.given_states import check_rows
from kvq.layers.held_bytes import report_memory
from kvq.layers.memory_report import MemoryReport
from kvq.layers.model_layers import DecoderConfig, build_layers
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.sliding_layer import SlidingKVQLayer
from kvq.layers.transformers_layers import (
    carrier_of,
    carries_sum,
    count_rows,
    fork_layer,
    has_forgotten,
    reset_layer,
    select_rows,
)
from kvq.persistence import CacheFile, ModelReference, check_calibration_matches, write_layers
from kvq.transformers_seams.layer_kinds import new_layer
from kvq.transformers_seams.position_offsets import OFFSETS, read_offsets, restore_offsets
from kvq.user_warnings import warn_user

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has the second only


class KVQ(CarriedStates, Evictable, KnownTokens, Restorable):
    """A quantized KV cache.

    Args:
        config: a `KVQCacheConfig`, a mapping of its fields, the path of a YAML or JSON file, or None for the defaults.
        model: the model or its configuration. It says which layers are sliding, shared or hybrid, and is needed
            where a layer is counted from the end.
        padding: tokens of left padding in each row of the batch, which then never shape a group's scale. Under the
            "kvq" attention the cache reads it from the first forward's mask; under another one, pass it.
        **overrides: single fields, or `preset="4bit"` for several, which win over `config`.

    Raises:
        ConfigError: the configuration is wrong.
        BackendError: the backend is unavailable.
        ModelError: nothing in this model would be quantized.

    Example:
        >>> cache = KVQ(backend="quanto", nbits_k=4, nbits_v=2)
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        model: PreTrainedModel | PretrainedConfig | None = None,
        padding: Sequence[int] | None = None,
        **overrides: Any,
    ) -> None:
        own = resolve_config(config, **overrides)
        check_calibration_matches(own.calibration, model)
        self._fill(own, None if model is None else find_decoder(model), padding)
        self._model = ModelReference(model)

    @classmethod
    def of_decoder(
        cls,
        config: KVQCacheConfig,
        decoder: DecoderConfig,
        padding: Sequence[int] | None = None,
        *,
        bounded: bool = True,
    ) -> KVQ:
        """Return a cache for one attention of an encoder-decoder model; raises the errors of the constructor.

        Where it is not bounded, layers that slide hold all tokens too: those of an encoder.
        """
        cache = cls.__new__(cls)
        cache._fill(config, decoder, padding, bounded=bounded)
        return cache

    def _fill(
        self,
        config: KVQCacheConfig,
        decoder: DecoderConfig | None,
        padding: Sequence[int] | None,
        *,
        bounded: bool = True,
    ) -> None:
        self.config = config
        self._model_config = None if decoder is None else decoder.layers
        self.attention_detector = AttentionDetector(None if decoder is None else decoder.attention)
        self._model = ModelReference()
        self._padding = BatchPadding(check_padding(padding))
        self.is_watched = False
        self._records_past = False
        self._history: TokenHistory | None = None
        self._position_offsets: torch.Tensor | None = None
        self._thread_guard = ThreadGuard()
        self._ticket = Ticket.of(self)
        if self._model_config is None and self.config.needs_layer_count:
            fault = Fault(("layers",), "a layer is counted from the end; pass `model=`, which has the number of layers")
            raise ConfigError([fault])
        layers: list[Any] = []
        if self._model_config is not None:
            layers = build_layers(self.config, self._model_config, self._padding.counts, bounded=bounded)
        super().__init__(layers=layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of one layer and return all its keys and values for the attention of the current forward.

        Args:
            key_states: `[B, H, T, D_k]`; copied.
            value_states: `[B, H, T, D_v]`; copied.
            layer_idx: index of the layer.
            *args: passed on to layers of transformers.
            **kwargs: passed on too.

        Returns:
            Keys and values `[B, H, total, D]`: plain tensors that alias nothing in the cache, or handles where the
            model's active attention is "kvq". Without `model=` the cache detects it at the model's first attention.
            In a model that torch.compile traces: what the "kvq" attention adds to the cache.

        Raises:
            StatesError: the states do not fit; the cache is then as it was before.
            CacheStateError: another thread is in the middle of a forward with this cache, which is then as it was. Or
                torch.export is tracing, which the cache cannot be part of.
        """
        if torch.compiler.is_dynamo_compiling() and self._may_defer(key_states, value_states):
            return DeferredPair(self, self._ticket, key_states, value_states, layer_idx).states()
        states: tuple[torch.Tensor, torch.Tensor] = self.take(key_states, value_states, layer_idx, *args, **kwargs)
        return states

    # Traced by torch.compile, it would be compiled again with every chunk.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def take(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `update`, outside of graphs."""
        if _is_exporting():
            raise CacheStateError(
                "torch.export cannot record what a KVQ does; export with a cache of transformers: "
                "DynamicCache(list(cache)) has the same tokens, cache.materialize(layer_idx) those of one layer"
            )
        # Not a context manager: every layer comes by here at every step.
        self._thread_guard.enter(layer_idx, self._is_in_step)
        count, succeeded = len(self.layers), False
        try:
            self._grow(layer_idx)
            states = self._update_layer(self.layers[layer_idx], key_states, value_states, *args, **kwargs)
            succeeded = True
        finally:
            if not succeeded:
                del self.layers[count:]
            self._thread_guard.leave(layer_idx, succeeded=succeeded)
        if not self._padding.is_settled:
            self._padding.settle(value_states)
        self.attention_detector.expect(states[0])
        return states

    @property
    def max_cache_len(self) -> int:
        """The longest length, which PEFT asks for before it puts a cache of its own in the place of ours: -1, none.

        Raises:
            AttributeError: the cache was made by hand, and nobody would notice that it stays empty.
        """
        if self.is_watched:
            return -1
        raise AttributeError(
            "KVQ has no max_cache_len: it grows without a limit. Prefix tuning of PEFT asks for one, then generates "
            "with a cache of its own, which kvq cannot quantize"
        )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of the keys that the next forward of `query_length` tokens sees in a layer."""
        if not self._padding.is_settled:
            expect_mask(self)
        if not torch.compiler.is_compiling():
            # Now, since a later text replaces them in the model.
            self._position_offsets = read_offsets(self._model.find_offset_holder())
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def learn_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Take the left padding of the batch from the mask `[B, T]` of the first forward, unless it is known."""
        self._padding.learn(attention_mask)
        for layer in self.layers:
            if isinstance(layer, KVQLayer) and not layer.is_initialized:
                layer.padding = self._padding.counts

    def memory(self) -> MemoryReport:
        """Return the bytes held, counted from the storages that exist, against those of `DynamicCache`."""
        return report_memory(self.layers)

    def materialize(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer as fresh full-precision tensors `[B, H, T, D]`.

        Raises:
            CacheStateError: the layer holds nothing yet.
        """
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if layer is None or not layer.is_initialized:
            raise CacheStateError(f"layer {layer_idx} holds no tokens yet; run the model first")
        return layer.materialize() if isinstance(layer, KVQLayer) else (layer.keys.clone(), layer.values.clone())

    def save(
        self,
        path: str | Path,
        *,
        model: PreTrainedModel | PretrainedConfig | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> None:
        """Write the cache to a file atomically: a crash leaves the old file or the new one.

        Args:
            path: the file to write, safetensors.
            model: the model whose states these are, for `load` to check; by default that of `KVQ(model=...)`.
            token_ids: int64 `[B, T]`, the tokens that were fed, or more; they come back as `token_ids`. By default
                those of the cache, where it knows all that it holds.

        Raises:
            CacheFileError: the file cannot be written.
            CacheStateError: the cache is empty, in the middle of a forward, has evicted tokens, or has layers that no
                file can hold.
            ConfigError: a backend was given as an object that no file can name.
        """
        owner = model or self._model.find() or self._model_config
        known = self.token_ids
        if token_ids is None and known is not None and known.shape[1] >= self.get_seq_length():
            token_ids = known
        write_layers(
            path,
            self.config,
            self.layers,
            padding=self._padding.counts,
            model=owner,
            token_ids=token_ids,
            position_offsets=self._position_offsets,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: PreTrainedModel | PretrainedConfig | None = None,
        device: str | torch.device | None = None,
        calibration: Calibration | str | Path | None = None,
    ) -> KVQ:
        """Return the cache that a file holds; nothing in the file is executed.

        Args:
            path: the file to read.
            model: the model that goes on with it; checked against the one whose states were saved. One that keeps
                offsets of images in itself (`rope_deltas` of Qwen2-VL) gets those that it had then.
            device: where the states live; default: where the layers of the model are, or the CPU.
            calibration: where the calibration is that the cache was made with; default: where it was then. The file
                has its digest alone, and another one is refused.

        Raises:
            CacheFileError: the file is damaged, of another kind, newer than this release, or of another model.
            ConfigError, BackendError: the configuration in the file is not available here.
        """
        with CacheFile(path, calibration) as file:
            if model is not None:
                file.check_model(model)
            cache = cls(file.config, model=model, padding=file.header.padding)
            cache.layers, _ = file.read_layers(cache.layers, model, device)
            cache._padding.settle()
            cache.token_ids = file.read_token_ids()
            cache._put_offsets_back(file.read_position_offsets())
        return cache

    def _put_offsets_back(self, offsets: torch.Tensor | None) -> None:
        """Let the model go on with the offsets between tokens and positions that it had beside these states."""
        self._position_offsets = offsets
        holder = self._model.find_offset_holder()
        if holder is None:
            return
        if offsets is None:
            warn_user(
                f"the cache does not say which {OFFSETS} the model had: it was not made with model=...; where it holds "
                "images, later tokens get wrong positions unless position_ids are passed"
            )
            return
        restore_offsets(holder, offsets)

    @classmethod
    def concatenate(cls, caches: Sequence[KVQ], *, model: PreTrainedModel) -> KVQ:
        """Return a cache of several texts that were read apart, as if they stood behind each other.

        The keys of every text but the first are turned to their new positions by the model's own rotary embedding. That
        this gives the keys which the model computes there is tried on the model with a few tokens.

        What is lost: no text was read with those before it, so its states know nothing of them, and what comes next
        finds the beginning of each text in the place of one (docs/method.md has the cost). And all but the first text
        is quantized once more; that one stays bit for bit.

        Args:
            caches: one for each text, of the same model, layers and rows; they stay as they are.
            model: the model, with weights.

        Raises:
            CacheStateError: a cache is empty, has left padding or evicted tokens, or a layer does not hold all tokens.
            ModelError: the model's keys do not turn with their positions in one known way.
            StatesError: the caches do not fit together, or there are none.
        """
        return merge(caches, model)

    @property
    def has_padding(self) -> bool:
        """Whether a row begins with left padding, as far as it is known."""
        return any(self._padding.counts or ())

    def move_to(self, device: str | torch.device) -> None:
        """Move all layers to a device; a store that the configuration offloads stays where it is.

        It is not called `to`, since accelerate calls that on every object that has it.

        Raises:
            ConfigError: the device cannot be used.
            KVQError: a backend cannot work there; the cache is then as it was.
        """
        moved = move_layers(self.layers, device)
        self.layers: list[Any] = moved
        self._known_carriers = None

    def fork(self) -> KVQ:
        """Return an independent cache with the same tokens; both share the tensors until one of them changes its own.

        The fork copies the window and an open chunk of a quantized layer when it grows that layer. Of transformers'
        layers, those of plain attention share keys and values; others are copied at once.
        """
        other = copy.copy(self)
        other._known_carriers = None  # which would keep these layers alive
        other._thread_guard, other.attention_detector = ThreadGuard(), self.attention_detector.fork()
        other._ticket = Ticket.of(other)
        other._padding = copy.copy(self._padding)
        other.layers = [layer.fork() if isinstance(layer, KVQLayer) else fork_layer(layer) for layer in self.layers]
        return other

    def _take(self, held: KVQ) -> None:
        self._known_carriers = None
        self.layers, self._padding, self._history = held.layers, held._padding, held._history
        self._records_past = held._records_past
        if held._position_offsets is not None:
            self._put_offsets_back(held._position_offsets)

    def activate_past_recording(self) -> None:
        """Let layers keep the states that a crop may have to bring back; see `KVQLayer.activate_past_recording`."""
        self._records_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, and quantize those that waited while the past was recorded; see `KVQLayer.crop`.

        Raises:
            CacheStateError: a layer carries a state that is the sum of all tokens, of which none can be taken back,
                has forgotten what came before its window, or has evicted tokens behind which too few came.
            StatesError: the number is positive.
        """
        stuck = [index for index, layer in enumerate(self.layers) if carries_sum(carrier_of(layer))]
        if tokens_to_remove < 0 and stuck:
            raise CacheStateError(
                f"crop({tokens_to_remove}): layers {stuck} carry states of linear attention, which cannot go back; "
                "cache.snapshot() before the tokens that may have to go, and cache.restore(snapshot), do"
            )
        if tokens_to_remove > 0:
            raise StatesError(f"crop({tokens_to_remove}) is not supported; pass a negative number of tokens to remove")
        bounded = [index for index, layer in enumerate(self.layers) if has_forgotten(layer)]
        if bounded:
            raise CacheStateError(
                f"crop({tokens_to_remove}): layers {bounded} slide and have forgotten what came before their window; "
                "call cache.activate_past_recording() before the tokens that may have to go, or cache.snapshot()"
            )
        for layer in self.layers:
            if isinstance(layer, SlidingKVQLayer):
                layer.check_crop(tokens_to_remove)
        self._check_evictions(tokens_to_remove)
        super().crop(tokens_to_remove)
        if self._history is not None and tokens_to_remove < 0:
            self._history = self._history.cropped(self.get_seq_length())
        if not self.get_seq_length() and self._padding.forget_learnt():
            for layer in self.layers:
                if isinstance(layer, KVQLayer):
                    layer.reset()

    def reset(self) -> None:
        """Forget everything; the next update may bring states of another shape."""
        for layer in self.layers:
            reset_layer(layer)
        self.attention_detector.forget()
        self._padding.forget()
        self._history = self._position_offsets = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows: row `i` becomes the former row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._select_what_goes_with_rows(lambda rows: rows[beam_idx.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._select_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch, integers or a mask."""
        chosen = indices.cpu()
        self._select_rows(lambda rows: rows[chosen])

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Yield for each layer its keys, its values and the tensor of its sliding window, as `DynamicCache` does.

        Keys and values are `[B, H, T, D]` in full precision, made layer by layer; None where a layer holds none.
        """
        for layer in self.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    def __getitem__(self, index: object) -> NoReturn:
        """Refuse: a cache is not a tuple of tensors any more, and `DynamicCache` none either.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            f"cache[{index!r}] is not supported; cache.materialize(layer_idx) returns the keys and values of a layer"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQ:
        """Return an independent copy that belongs to the same model."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self._model_config)] = self._model_config
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        other._ticket = Ticket.of(other)
        return other

    def __repr__(self) -> str:
        return f"KVQ({len(self.layers)} layers, {self.get_seq_length()} tokens)"

    def _update_layer(
        self, layer: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(layer, KVQLayer):
            check_rows(f"{type(layer).__name__}: states", key_states, count_rows(layer))
            states: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return states
        layer.check_states(key_states, value_states)
        self._check_order(layer, key_states)
        packed = self._reads_packed() and not _needs_gradients(key_states, value_states)
        if not layer.is_offloaded:
            return layer.add(key_states, value_states, packed=packed)
        with reading_ahead(self.layers, layer.layer_idx):
            return layer.add(key_states, value_states, packed=packed)

    def _may_defer(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Return whether "kvq" attention is going to add these states, which a model that is being compiled hands over.

        Asked while torch.compile traces, so what it reads here decides when a model is compiled again.
        """
        config = self.attention_detector.config
        return (
            self._ticket.is_issued
            and config is not None
            and config._attn_implementation == ATTENTION_NAME
            and not getattr(config, "num_kv_shared_layers", None)  # whose layers read one pair several times
            and not _needs_gradients(key_states, value_states)
            and not getattr(torch.compiler, "_is_exporting_flag", True)  # torch 2.6 has none
        )

    def _is_in_step(self) -> bool:
        """Whether all quantized layers that hold tokens hold equally many."""
        lengths = {layer.seen_length for layer in self.layers if isinstance(layer, KVQLayer)}
        return len(lengths - {0}) <= 1

    def _grow(self, layer_idx: int) -> None:
        """Add layers up to `layer_idx`; with a model all exist from the start."""
        if layer_idx < 0:
            raise StatesError(f"layer {layer_idx} does not exist: layers are counted from 0")
        if self._model_config is not None:
            if layer_idx >= len(self.layers):
                raise ModelError(f"layer {layer_idx} does not exist: the cache was built for {len(self.layers)} layers")
            return
        while len(self.layers) <= layer_idx:
            settings = self.config.for_layer(len(self.layers))
            own = KVQLayer(len(self.layers), settings, self._padding.counts)
            own.record_past = self._records_past
            self.layers.append(new_layer() if settings.full_precision else own)

    def _select_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch of every layer that holds something; `choose` takes the numbers of its rows."""
        for layer in self.layers:
            count = layer.count_rows() if isinstance(layer, KVQLayer) else count_rows(layer)
            if count is not None:
                select_rows(layer, choose(torch.arange(count)))
        self._select_what_goes_with_rows(choose)

    def _select_what_goes_with_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._history is not None:
            self._history = self._history.select_rows(choose(torch.arange(len(self._history.ids))))
        offsets = self._position_offsets
        if offsets is not None and len(offsets) > 1:  # one may serve all rows
            self._position_offsets = offsets[choose(torch.arange(len(offsets))).to(offsets.device)]

    def _check_order(self, layer: KVQLayer, key_states: torch.Tensor) -> None:
        """Check, without a model that says how its layers use the cache, that they are filled in step.

        An encoder-decoder model, which would store self- and cross-attention on top of each other, is noticed here.
        """
        if self._model_config is not None or layer.layer_idx == 0:
            return
        before = self.layers[layer.layer_idx - 1]
        reached = layer.seen_length + key_states.shape[-2]
        if isinstance(before, KVQLayer) and before.seen_length != reached:
            raise StatesError(
                f"layer {layer.layer_idx} would hold {reached} tokens, but layer {before.layer_idx} holds "
                f"{before.seen_length}; pass `model=` if the layers of this model use the cache in different "
                "ways, and a new cache if a forward was cut short"
            )

    def _reads_packed(self) -> bool:
        active = self.attention_detector.name
        if active is not None and active != ATTENTION_NAME:
            hint_at_attention(active)
        return active == ATTENTION_NAME


def _needs_gradients(*states: torch.Tensor) -> bool:
    """Return whether gradients flow to states, which they cannot through a handle that a model computes with."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in states)
