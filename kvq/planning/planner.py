"""Making a plan: the model's outline, a rehearsal of every kind of layer, and the search for the largest context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig, ResolvedLayer
from kvq.config.rounding_choice import ERROR_FEEDBACK
from kvq.errors import ConfigError, Fault, ModelError
from kvq.layers.biased_keys import explain_biased_keys
from kvq.layers.given_states import STATES_DTYPES
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.savings import effective_bits
from kvq.layers.transformers_layers import carrier_of
from kvq.planning.cache_plan import CachePlan, LayerPlan, SidePlan, join_layers
from kvq.planning.model_outline import ModelOutline, find_dtype, outline_model
from kvq.planning.reasons import Reasons
from kvq.planning.rehearsal import Moments, Rehearsal
from kvq.plugin_api.packed_format import find_packed_format
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.store.error_feedback import count_table_bytes
from kvq.store.steps import find_steps
from kvq.transformers_seams.layer_kinds import kind_of
from kvq.units import format_bytes, format_ratio

MAX_CONTEXT = 1 << 24
"""Tokens of the longest prompt that is planned for."""
MAX_SEARCH = 1 << 22
"""Tokens up to which the largest context is looked for."""


def plan(
    model_config: PretrainedConfig,
    config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    context: int,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    gpu_memory: int | None = None,
    weights_bytes: int | None = None,
) -> CachePlan:
    """Plan the cache of a model from its configuration alone.

    Args:
        model_config: the model's configuration.
        config: the cache's configuration, as `KVQ` takes it.
        context: tokens of the prompt in each row, 1 to `MAX_CONTEXT`.
        batch: rows, at least 1.
        dtype: the dtype of weights and states; None: that of the configuration.
        gpu_memory: bytes of the device, for the largest context that fits; None: it is not looked for.
        weights_bytes: bytes of the weights; None: parameters times their dtype.

    Raises:
        ConfigError: a number is out of range, or the configuration is wrong or makes no sense for this model.
        BackendError: a backend is unavailable.
        ModelError: the cache cannot serve this model or its dtype, or what it caches is not known from its
            configuration.
    """
    _check_numbers(context=context, batch=batch, gpu_memory=gpu_memory, weights_bytes=weights_bytes)
    cache = KVQ(config, model=model_config)
    _check_dtype(dtype, model_config)
    outline = outline_model(model_config, batch, dtype)
    stage = _Stage(cache, outline, model_config)
    layers = stage.plan_layers(context)
    weights = outline.weights_bytes if weights_bytes is None else weights_bytes
    largest = None if gpu_memory is None else _find_largest(stage.peak_bytes, gpu_memory - weights)
    return CachePlan(
        model=outline.name,
        context=context,
        batch=batch,
        dtype=str(outline.dtype).removeprefix("torch."),
        layers=layers,
        horizon=stage.horizon,
        num_parameters=outline.num_parameters,
        weights_bytes=weights,
        gpu_memory_bytes=gpu_memory,
        largest_context=largest,
        is_search_bounded=largest == MAX_SEARCH,
        unsupported=_list_unsupported(cache.layers),
        warnings=_list_warnings(cache, outline, layers, context),
        notes=_list_notes(layers, context, stage.horizon, model_config, counted=weights_bytes is None),
        left_out=_list_left_out(layers),
    )


class _Stage:
    """The layers of a cache, each kind rehearsed once.

    Args:
        cache: the cache, not yet filled.
        outline: the outline of its model.
        model_config: the configuration of its model.
    """

    def __init__(self, cache: KVQ, outline: ModelOutline, model_config: PretrainedConfig) -> None:
        self.cache = cache
        self.outlines = outline.layers
        self.rehearsals = [Rehearsal(own, plain) for own, plain in zip(cache.layers, outline.layers, strict=True)]
        self.horizon = max(one.horizon for one in self.rehearsals)
        self.reasons = Reasons(cache.config, model_config.get_text_config(decoder=True), cache.layers)
        self.kinds = [one.signature for one in self.rehearsals]

    def plan_layers(self, context: int) -> tuple[LayerPlan, ...]:
        """Return what every layer will hold."""
        held = self._run(context)
        plain = self._run(context, full_precision=True)
        return tuple(
            _plan_layer(index, one, self.reasons.explain(index, self.outlines[index]), held[kind], plain[kind])
            for index, (one, kind) in enumerate(zip(self.rehearsals, self.kinds, strict=True))
        )

    def peak_bytes(self, context: int) -> int:
        """Return the most that is held on the model's device while the prompt and the next tokens are taken in."""
        held = self._run(context)
        return sum(held[kind].peak_bytes for kind in self.kinds)

    def _run(self, context: int, *, full_precision: bool = False) -> dict[Any, Moments]:
        kinds = dict(zip(self.kinds, self.rehearsals, strict=True))
        return {kind: one.run(context, self.horizon, full_precision=full_precision) for kind, one in kinds.items()}


def _find_largest(peak_bytes: Callable[[int], int], available: int) -> int:
    """Return the most tokens, up to `MAX_SEARCH`, whose peak fits; 0 if none do."""
    fitting, failing = 0, 1
    while failing <= MAX_SEARCH and peak_bytes(failing) <= available:
        fitting, failing = failing, 2 * failing
    failing = min(failing, MAX_SEARCH + 1)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if peak_bytes(middle) <= available else (fitting, middle)
    return fitting


def _plan_layer(index: int, one: Rehearsal, reason: str, held: Moments, plain: Moments) -> LayerPlan:
    return LayerPlan(
        layer_idx=index,
        kind=held.prompt.kind,
        reason=reason,
        total_bytes=held.prompt.total_bytes,
        full_precision_bytes=plain.prompt.total_bytes,
        later_bytes=held.later.total_bytes,
        later_full_precision_bytes=plain.later.total_bytes,
        peak_bytes=held.peak_bytes,
        offloaded_bytes=held.offloaded_bytes,
        key=_plan_side(one, "key"),
        value=_plan_side(one, "value"),
    )


def _plan_side(one: Rehearsal, name: Side) -> SidePlan | None:
    if one.states is None:
        return None
    states = one.states[0 if name == "key" else 1]
    shape = SidePlan(num_heads=states.shape[1], head_dim=states.shape[3])
    if one.quantized is None:
        return shape
    return _describe(shape, one.quantized.settings, one.quantized.side(name).codec, name)


def _describe(shape: SidePlan, settings: ResolvedLayer, quantizer: Quantizer, name: Side) -> SidePlan:
    chosen = settings.side(name)
    packed, (rotation, balance, clip) = find_packed_format(quantizer), find_steps(quantizer)
    return SidePlan(
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        backend=chosen.backend.name,
        nbits=chosen.nbits,
        granularity=str(chosen.granularity),
        group_length=None if packed is None else packed.group_length,
        rotation=rotation,
        balance=balance,
        clip=clip,
        rounding=chosen.rounding,
        effective_bits=effective_bits(quantizer, shape.head_dim),
    )


def _check_numbers(**numbers: int | None) -> None:
    faults = []
    for name, number in numbers.items():
        if number is None:
            continue
        largest = MAX_CONTEXT if name == "context" else None
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= (largest or number):
            upper = f" and at most {largest:,}" if largest else ""
            faults.append(Fault((name,), f"{number!r} is not accepted; a whole number, at least 1{upper}"))
    if faults:
        raise ConfigError(faults)


def _check_dtype(dtype: torch.dtype | None, model_config: PretrainedConfig) -> None:
    wanted = dtype or find_dtype(model_config)
    if wanted is not None and wanted not in STATES_DTYPES:
        source = "dtype=" if dtype is not None else f"dtype of the {type(model_config).__name__}: "
        raise ModelError(
            f"{source}{wanted}: such keys and values cannot be quantized; the cache takes "
            f"{', '.join(map(str, STATES_DTYPES))}: load the model in one of them, from_pretrained(..., dtype=...)"
        )


def _list_warnings(cache: KVQ, outline: ModelOutline, layers: tuple[LayerPlan, ...], context: int) -> tuple[str, ...]:
    settings = {layer.layer_idx: layer.settings for layer in cache.layers if isinstance(layer, KVQLayer)}
    biased = explain_biased_keys(outline.key_biases, settings)
    quantized = [one for one in layers if one.is_quantized]
    held, plain = sum(one.total_bytes for one in quantized), sum(one.full_precision_bytes for one in quantized)
    more = (
        f"at {context:,} tokens the quantized layers hold {format_bytes(held)}, no less than the {format_bytes(plain)} "
        "of full precision: the newest tokens, whole groups and room for the next ones outweigh what quantizing saves"
    )
    return tuple(filter(None, (biased, more if held >= plain else None)))


def _list_unsupported(layers: Sequence[Any]) -> tuple[str, ...]:
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if unsupported := kind_of(carrier_of(layer)).unsupported:
            found.setdefault(unsupported, []).append(index)
    return tuple(f"{what} are not quantized (layers {join_layers(indices)})" for what, indices in found.items())


def _list_notes(
    layers: tuple[LayerPlan, ...], context: int, horizon: int, model_config: PretrainedConfig, *, counted: bool
) -> tuple[str, ...]:
    peak, later = sum(one.peak_bytes for one in layers), sum(one.later_bytes for one in layers)
    plain = sum(one.later_full_precision_bytes for one in layers)
    offloaded = sum(one.offloaded_bytes for one in layers)
    notes = [
        f"{horizon} tokens later: {format_bytes(later)} held, {format_bytes(plain)} in full precision: "
        f"{format_ratio(plain / max(1, later))}; up to then at most {format_bytes(peak)}, room opened ahead included"
    ]
    if plain < sum(one.full_precision_bytes for one in layers):
        notes.append("transformers' sliding layers hold the whole prompt up to the next token, then their window only")
    if offloaded:
        notes.append(f"{format_bytes(offloaded)} of the cache lie in the memory of the host, by device: cpu")
    return (*notes, *_list_model_notes(context, model_config, counted=counted))


def _list_model_notes(context: int, model_config: PretrainedConfig, *, counted: bool) -> list[str]:
    notes = []
    limit = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and context > limit:
        notes.append(f"the model was made for {limit:,} tokens")
    if find_dtype(model_config) is None:
        notes.append("the configuration names no dtype; float32, as transformers takes it, unless another is given")
    if counted and getattr(model_config, "quantization_config", None):
        notes.append("the checkpoint's weights are quantized and take less than counted here")
    return notes


def _list_left_out(layers: tuple[LayerPlan, ...]) -> tuple[str, ...]:
    largest = max((one.full_precision_bytes for one in layers if one.is_quantized), default=0)
    return (
        "activations, above all those of the prompt",
        f"one layer in full precision while attention reads it (up to {format_bytes(largest)}, and what "
        "dequantizing needs beside it)",
        "memory of the device's runtime, and fragmentation",
        *_list_tables(layers),
    )


def _list_tables(layers: tuple[LayerPlan, ...]) -> list[str]:
    """Return what `ErrorFeedback` holds, which layers have once, whatever the number of tokens."""
    sides = [one.key for one in layers if one.key is not None and one.key.rounding == ERROR_FEEDBACK]
    held = sum(side.num_heads * count_table_bytes(side.head_dim) for side in sides)
    return [f"tables of {ERROR_FEEDBACK} ({format_bytes(held)})"] if held else []
