"""What is checked of every kind of model, and the row that the page of the docs has for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import PADDING, PROMPT_LENGTH, Family
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionCacheLayerMixin

from kvq import KVQ, EncoderDecoderKVQ, attach
from kvq.errors import CacheStateError, ModelError, StatesError
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import carrier_of
from kvq.planning.reasons import Reasons

NEW_TOKENS = 12
GREEDY = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=8, nbits_v=8, residual_length=32, q_group_size=32)
COARSE = dict(nbits_k=2, nbits_v=2, residual_length=32, q_group_size=32)
BOUND = 0.1
"""Largest difference of a logit as a share of their range at 8 bits."""
LEAST_RATIO = 16
"""How many times larger it is at 2 bits, at least; the models show 26 to 170. It bounds the former where a model does
not mind, and shows that the quantized history matters."""
LEAST_DISTINCT = 8
LEAST_FLUSHES = 3
CROPPED = 70


@dataclass(frozen=True)
class Report:
    """What was found of one kind of model.

    Attributes:
        title: of the kind.
        model: class of the model.
        layers: what each layer of the default cache is, in words.
        without_model: what a cache does that was built without `model=`.
        attached: how the layers of an attached cache are read while decoding.
        flushes: fewest of a quantized layer.
        crop: what a crop into the store did.
    """

    title: str
    model: str
    layers: tuple[str, ...]
    without_model: str
    attached: str
    flushes: int
    crop: str

    @property
    def row(self) -> str:
        """The row of the page."""
        layers = "<br>".join(self.layers)
        cells = (self.title, f"`{self.model}`", layers, self.without_model, self.attached, self.flushes, self.crop)
        return f"| {' | '.join(map(str, cells))} |"


class Examination:
    """One kind of model under examination."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model = family.build()
        self.is_encoder_decoder = family.encoder is not None
        self.coarse = 0.0
        self.text = {padded: self._generate(padded) for padded in (False, True)}

    def examine(self) -> Report:
        """Run every check.

        Raises:
            AssertionError: one of them failed.
        """
        self._check_that_it_is_telling()
        self._check_exact_tokens()
        without = self._check_without_model()
        flushes = min(self._check_quantized(padded) for padded in (False, True))
        crop = self._check_crop()
        if self.is_encoder_decoder:
            self._check_cross_attention()
        layers = tuple(_merge(self._describe_layers()))
        kind = type(self.model).__name__
        return Report(self.family.title, kind, layers, without, self._check_attached(), flushes, crop)

    def cache(self, options: dict[str, Any], *, padded: bool = False) -> KVQ | EncoderDecoderKVQ:
        kind = EncoderDecoderKVQ if self.is_encoder_decoder else KVQ
        return kind(options, model=self.model, padding=[PADDING, 0] if padded else None)

    def plain_cache(self) -> DynamicCache | EncoderDecoderCache:
        config = self.model.config.get_text_config(decoder=True)
        if self.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return DynamicCache(config=config)

    def _generate(self, padded: bool, cache: Any = None) -> torch.Tensor:
        inputs = self.family.inputs(padded=padded)
        text = self.model.generate(**inputs, past_key_values=cache, **GREEDY)
        if self.family.encoder == "audio":  # whose `generate` leaves the prompt out
            text = torch.cat([inputs["decoder_input_ids"], text], dim=1)
        return text

    def _check_that_it_is_telling(self) -> None:
        for text in self.text.values():
            assert text.shape[1] == PROMPT_LENGTH + NEW_TOKENS
            distinct = min(len(set(row.tolist())) for row in text[:, PROMPT_LENGTH:])
            assert distinct >= LEAST_DISTINCT, f"only {distinct} distinct tokens, which would prove nothing"

    def _check_exact_tokens(self) -> None:
        """Where everything stays in the window, the tokens are those of DynamicCache."""
        cache = self.cache(EXACT)
        assert torch.equal(self._generate(False, cache), self.text[False]), "not the tokens of DynamicCache"
        assert cache.get_seq_length() == PROMPT_LENGTH + NEW_TOKENS - 1
        with attach(self.model, EXACT) as attachment:
            assert torch.equal(self._generate(True), self.text[True]), "padded: not the tokens of DynamicCache"
        assert type(attachment.cache) is type(cache)
        assert next(_quantized_layers(attachment.cache)).padding == (PADDING, 0)

    def _check_attached(self) -> str:
        """Return how a kernel reads the layers, or why none does."""
        with attach(self.model, QUANTIZED) as attachment:
            self.model.generate(**self.family.inputs(), max_new_tokens=2, do_sample=False)
        readers = {layer.kernel_cache.last_reader for layer in _quantized_layers(attachment.cache)}
        if readers == {""}:
            return "dequantized: the model itself computes with the keys"
        found = {reader.replace("materialized", "dequantized") for reader in readers}
        materialized = {reader for reader in found if reader.startswith("dequantized")}
        assert len(found) == 1 or not materialized, found
        return materialized.pop() if materialized else "read packed"

    def _check_without_model(self) -> str:
        carriers = [carrier_of(layer) for layer in self.cache({}).layers]
        carries_states = any(isinstance(one, LinearAttentionCacheLayerMixin | DynamicIndexedLayer) for one in carriers)
        if self.is_encoder_decoder or carries_states:
            with pytest.raises(StatesError if self.is_encoder_decoder else ModelError, match="pass `model=`"):
                self._generate(False, KVQ(EXACT))
            return "asks for `model=`"
        found = self._generate(False, KVQ(EXACT))
        assert torch.equal(found, self.text[False]), "without model=: not the tokens of DynamicCache"
        return "same tokens"

    def _check_quantized(self, padded: bool) -> int:
        """Return the flushes of the layer that has the fewest."""
        reference = self._forced(self.plain_cache(), padded)
        cache = self.cache(QUANTIZED, padded=padded)
        difference = _difference(self._forced(cache, padded), reference)
        coarse = _difference(self._forced(self.cache(COARSE, padded=padded), padded), reference)
        print(f"{self.family.title}{' padded' if padded else ''}: {difference:.4f} at 8 bits, {coarse:.4f} at 2 bits")
        assert difference <= BOUND
        assert coarse >= LEAST_RATIO * difference
        self.coarse = coarse
        flushes = [_count_flushes(layer) for layer in _quantized_layers(cache)]
        assert min(flushes) >= LEAST_FLUSHES
        return min(flushes)

    def _check_cross_attention(self) -> None:
        """On request the states of the encoder are quantized too."""
        reference = self._forced(self.plain_cache(), False)
        kept = self.cache(QUANTIZED)
        self._forced(kept, False)
        cache = self.cache({**QUANTIZED, "cross_attention": "quantize"})
        assert self.coarse >= LEAST_RATIO * _difference(self._forced(cache, False), reference)
        stored = [layer.side("key").store.length for layer in _quantized_layers(cache.cross_attention_cache)]
        assert len(stored) == len(cache.layers)
        assert min(stored) >= LEAST_FLUSHES * 32
        assert cache.memory().total_bytes < kept.memory().total_bytes

    def _check_crop(self) -> str:
        """Crop far into the store, and go on with other tokens."""
        cache = self.cache(QUANTIZED)
        if any(getattr(carrier_of(layer), "recurrent_states", None) for layer in cache.layers):
            self._prefill(cache, self.text[False], None)
            held = cache.get_seq_length()
            with pytest.raises(CacheStateError, match="cannot go back"):
                cache.crop(-CROPPED)
            assert cache.get_seq_length() == held
            return "refused: linear attention cannot go back"
        slides = all(layer.is_sliding for layer in _quantized_layers(cache))
        if slides:
            self._check_deep_crop()
        reference = self._cropped_logits(self.plain_cache())
        stored = PROMPT_LENGTH - CROPPED
        found = self._cropped_logits(cache)
        quantized = next(_quantized_layers(cache))
        assert slides or quantized.side("key").cropped.groups, "the crop went past the store"
        assert self.coarse >= LEAST_RATIO * _difference(found, reference)
        return f"at token {stored}, {'while the past is recorded' if slides else 'into the store'}"

    def _check_deep_crop(self) -> None:
        """Where every layer has forgotten what is behind its window, a crop is refused that nothing prepared."""
        cache = self.cache(QUANTIZED)
        self._prefill(cache, self.text[False], None)
        with pytest.raises(CacheStateError, match="has forgotten what came before"):
            cache.crop(-CROPPED)
        assert cache.get_seq_length() == PROMPT_LENGTH

    def _cropped_logits(self, cache: Any) -> torch.Tensor:
        text = self.text[False]
        for layer in getattr(cache, "layers", []):
            if getattr(layer, "is_sliding", False) and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        encoded = self._prefill(cache, text, None)[1]
        cache.crop(-CROPPED)
        for layer in getattr(cache, "layers", []):
            layer.record_past = False
        other = text[:, PROMPT_LENGTH:].flip(1)
        text = torch.cat([text[:, : PROMPT_LENGTH - CROPPED], other], dim=1)
        return self._steps(cache, text, PROMPT_LENGTH - CROPPED, None, encoded)

    @torch.inference_mode()
    def _forced(self, cache: Any, padded: bool) -> torch.Tensor:
        """Return the logits of the new tokens `[B, T, V]` when the model is made to say the reference text."""
        text = self.text[padded]
        mask = self.family.inputs(padded=padded)[self._name("attention_mask")] if padded else None
        first, encoded = self._prefill(cache, text, mask, padded)
        rest = self._steps(cache, text, PROMPT_LENGTH, mask, encoded)
        return torch.cat([first, rest[:, :-1]], dim=1)

    @torch.inference_mode()
    def _prefill(
        self, cache: Any, text: torch.Tensor, mask: torch.Tensor | None, padded: bool = False
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        inputs = self.family.inputs(padded=padded)
        encoded: dict[str, Any] = {}
        if self.is_encoder_decoder:
            given = {name: inputs[name] for name in ("input_ids", "input_features", "attention_mask") if name in inputs}
            encoded = {"encoder_outputs": self.model.get_encoder()(**given)}
            if "attention_mask" in inputs:
                encoded["attention_mask"] = inputs["attention_mask"]
        images = {name: inputs[name] for name in ("pixel_values",) if name in inputs}
        return self._forward(cache, text, 0, PROMPT_LENGTH, mask, {**encoded, **images})[:, -1:], encoded

    @torch.inference_mode()
    def _steps(
        self, cache: Any, text: torch.Tensor, start: int, mask: torch.Tensor | None, encoded: dict[str, Any]
    ) -> torch.Tensor:
        """Feed the tokens from `start` on: one, one more, and the rest."""
        ends = [start, start + 1, start + 2, text.shape[1]]
        logits = [self._forward(cache, text, *piece, mask, encoded) for piece in pairwise(ends)]
        return torch.cat(logits, dim=1)

    def _forward(
        self, cache: Any, text: torch.Tensor, start: int, stop: int, mask: torch.Tensor | None, more: dict[str, Any]
    ) -> torch.Tensor:
        options: dict[str, Any] = {self._name("input_ids"): text[:, start:stop], **more}
        if mask is not None:
            seen = torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - mask.shape[1])], dim=1)[:, :stop]
            options[self._name("attention_mask")] = seen
            takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
            if takes_positions and self.model.config.model_type != "opt":  # which derives them from the mask
                options["position_ids"] = (seen.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        return self.model(past_key_values=cache, use_cache=True, **options).logits

    def _name(self, argument: str) -> str:
        return f"decoder_{argument}" if self.is_encoder_decoder else argument

    def _describe_layers(self) -> Iterator[tuple[int, str]]:
        """Yield the layers of the default cache in words."""
        cache = self.cache({})
        config = self.model.config.get_text_config(decoder=True)
        outlines = DynamicCache(config=config).layers
        reasons = Reasons(cache.config, config, cache.layers)
        for index, layer in enumerate(cache.layers):
            why = reasons.explain(index, outlines[index])
            if isinstance(layer, KVQLayer):
                key, value = layer.settings.key, layer.settings.value
                bits = f"keys {key.nbits:g} bit {key.granularity}, values {value.nbits:g} bit {value.granularity}"
                why = "; ".join([bits, *why.split("; ")[1:]])
            yield index, why
        if self.is_encoder_decoder:
            yield len(cache.layers), "cross-attention: kept, or quantized with `cross_attention`"


def _quantized_layers(cache: Any) -> Iterator[KVQLayer]:
    yield from (layer for layer in cache.layers if isinstance(layer, KVQLayer))


def _count_flushes(layer: KVQLayer) -> int:
    return (layer.dropped_length + layer.side("key").store.length) // layer.flush_length


def _difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).abs().max() / (reference.max() - reference.min())).item()


def _merge(described: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Yield one line for the layers of one kind."""
    found: dict[str, list[int]] = {}
    for index, text in described:
        found.setdefault(text, []).append(index)
    for text, indices in found.items():
        yield text if text.startswith("cross") else f"{', '.join(map(str, indices))}: {text}"


def examine(family: Family) -> Report:
    """Return what was found of one kind of model."""
    return Examination(family).examine()
