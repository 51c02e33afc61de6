"""From the layers of a cache to a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedModel

from kvq.config import KVQCacheConfig
from kvq.errors import CacheFileError, CacheStateError
from kvq.files.atomic import written_atomically
from kvq.files.container import SavedTensor, is_storable, write_container
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.transformers_layers import count_tokens
from kvq.persistence.carried import collect_carried
from kvq.persistence.fingerprint import fingerprint_backends, fingerprint_model
from kvq.persistence.header import FORMAT_NAME, CacheHeader, LayerHeader, TensorHeader
from kvq.persistence.layer_format import describe_layer, find_form, format_of


def write_layers(
    path: str | Path,
    config: KVQCacheConfig,
    layers: Sequence[Any],
    *,
    padding: tuple[int, ...] | None,
    model: PreTrainedModel | PretrainedConfig | None,
    token_ids: torch.Tensor | None,
    cross_layers: Sequence[Any] | None = None,
    position_offsets: torch.Tensor | None = None,
) -> None:
    """Write the layers of a cache; an existing file is replaced.

    Args:
        path: the file to write.
        config: the cache's configuration.
        layers: the cache's layers.
        padding: tokens of left padding in each row that the cache was built with, or None.
        model: the model whose states the layers hold, or None where that is not known.
        token_ids: int64 `[B, T]`, the tokens that the states are of, or None.
        cross_layers: the layers of the cross-attention, or None where there is none.
        position_offsets: the offsets that the model kept beside these states, or None.

    Raises:
        CacheFileError: the file cannot be written; an existing file is unchanged.
        CacheStateError: a layer is of a kind that the format does not know or has evicted tokens, or a forward was cut
            short.
        ConfigError: a backend was given as an object that no file can name.
    """
    groups = {"layers": layers} if cross_layers is None else {"layers": layers, "cross_layers": cross_layers}
    for group in groups.values():
        _check_layers(group)
    header = CacheHeader(
        kvq_version=metadata.version("kvq"),
        config=config.to_dict(),
        states_device=_states_device(layers),
        padding=None if padding is None else list(padding),
        token_ids=None if token_ids is None else _shape_of_ids(token_ids, layers),
        model=None if model is None else fingerprint_model(model),
        backends=fingerprint_backends(
            side.backend
            for layer in (*layers, *(cross_layers or ()))
            if isinstance(layer, KVQLayer)
            for side in (layer.settings.key, layer.settings.value)
        ),
        position_offsets=None if position_offsets is None else TensorHeader.of(position_offsets),
        **{name: _describe(group) for name, group in groups.items()},
    )
    tensors = {
        name: tensor for place, group in groups.items() for name, tensor in _collect(place, _describe(group), group)
    }
    if token_ids is not None:
        tensors["token_ids"] = SavedTensor.of(token_ids)
    if position_offsets is not None:
        tensors["position_offsets"] = SavedTensor.of(position_offsets)
    for name, tensor in tensors.items():
        if not is_storable(tensor.spec.dtype):
            raise CacheFileError(f"{path} cannot be written: {name} is {tensor.spec.dtype}, which no file can hold")
    facts = {"format": FORMAT_NAME, "format_version": str(header.format_version), "cache": header.model_dump_json()}
    try:
        with written_atomically(Path(path)) as file:
            write_container(file, facts, tensors)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be written: {error}") from error


def _check_layers(layers: Sequence[Any]) -> None:
    _check_evictions(layers)
    for index, layer in enumerate(layers):
        if find_form(layer) is None:
            raise CacheStateError(
                f"layer {index} is a {type(layer).__name__}, whose states no file of this version can hold; "
                "rerun the prompt instead"
            )
    lengths = {count_tokens(layer) for layer in layers} - {0}
    if not lengths:
        raise CacheStateError("the cache holds no tokens yet; run the model before it is saved")
    if len(lengths) > 1:
        raise CacheStateError(
            f"the layers hold {' and '.join(map(str, sorted(lengths)))} tokens; a forward was cut short, so the cache "
            "is not the beginning of any text"
        )


def _check_evictions(layers: Sequence[Any]) -> None:
    own = {index: layer for index, layer in enumerate(layers) if isinstance(layer, KVQLayer)}
    for layer in own.values():
        layer.check_whole()
    evicted = [index for index, layer in own.items() if layer.evicted_length]
    if evicted:
        raise CacheStateError(
            f"tokens were evicted from layers {evicted}, and a file does not hold at which position to go on; save "
            "the cache before, and evict after loading it"
        )


def _describe(layers: Sequence[Any]) -> list[LayerHeader]:
    try:
        return [describe_layer(layer) for layer in layers]
    except ValidationError as error:
        raise CacheStateError(f"the cache has states that no file can hold: {error}") from error


def _collect(group: str, headers: Iterable[LayerHeader], layers: Iterable[Any]) -> Iterable[tuple[str, SavedTensor]]:
    for index, (header, layer) in enumerate(zip(headers, layers, strict=True)):
        place = f"{group}.{index}"
        if header.states is not None:
            yield from format_of(header).collect(layer, place)
        yield from collect_carried(layer, place)


def _states_device(layers: Iterable[Any]) -> str:
    device: torch.device = next(layer.device for layer in layers if count_tokens(layer))
    return device.type


def _shape_of_ids(token_ids: torch.Tensor, layers: Iterable[Any]) -> tuple[int, int]:
    tokens = max(map(count_tokens, layers))
    if token_ids.dim() != 2 or token_ids.dtype is not torch.int64 or token_ids.shape[1] < tokens:
        raise CacheStateError(
            f"token_ids are {token_ids.dtype} {list(token_ids.shape)}; torch.int64 [batch, tokens] is needed, with no "
            f"fewer than the {tokens} tokens that the cache holds"
        )
    return token_ids.shape[0], token_ids.shape[1]
