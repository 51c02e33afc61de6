"""From a file to the layers of a cache.

A file is refused before anything is built from it: first the container, then the header, then the model, then the plan
of tensors that the quantizers' own layouts ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedModel

from kvq.calibration import Calibration
from kvq.config import KVQCacheConfig
from kvq.config.calibration_choice import move_calibration
from kvq.errors import CacheFileError
from kvq.files.atomic import find_other_kind
from kvq.files.container import ContainerReader, TensorSpec, parse_json
from kvq.layers.devices import usable_device
from kvq.layers.quantized_layer import KVQLayer
from kvq.layers.sliding_layer import SlidingKVQLayer
from kvq.persistence.carried import count_states, fill_carried, find_carried_form, plan_carried
from kvq.persistence.fingerprint import fingerprint_model
from kvq.persistence.header import (
    FORMAT_NAME,
    READABLE_VERSIONS,
    CacheHeader,
    LayerHeader,
    QuantizedHeader,
    QuantizedStates,
)
from kvq.persistence.layer_format import find_form, format_of
from kvq.persistence.matching import check_backends_match, check_model_matches
from kvq.transformers_seams.key_projections import find_layer_devices
from kvq.transformers_seams.layer_kinds import new_beside, new_layer
from kvq.user_warnings import warn_user


@dataclass(frozen=True)
class _HeldLayer:
    """A layer with what the header says of it, and where it goes."""

    layer: Any
    header: LayerHeader
    prefix: str
    device: torch.device

    @property
    def tokens(self) -> int | None:
        """Tokens that it will have been given, or None where it holds none."""
        if self.header.states is None:
            return None
        return format_of(self.header).count_tokens(self.layer, self.header.states)

    @property
    def rows(self) -> int | None:
        """Rows of its batch, or None where it holds no tokens."""
        states = self.header.states
        if states is None:
            return None
        return len(states.starts) if isinstance(states, QuantizedStates) else states.batch_size

    def prepare(self) -> None:
        if self.header.states is not None:
            format_of(self.header).prepare(self.layer, self.header.states, self.device)

    def plan(self, rows: int | None, tokens: int) -> Iterator[tuple[str, TensorSpec]]:
        if self.header.states is not None:
            yield from format_of(self.header).plan(self.layer, self.header.states, self.prefix)
        if self.header.carried is not None:
            yield from plan_carried(self.layer, self.header.carried, self.prefix, rows, tokens)

    def fill(self, read: Callable[[str], torch.Tensor]) -> None:
        if self.header.states is not None:
            format_of(self.header).fill(self.layer, self.header.states, self.prefix, read)
        if self.header.carried is not None:
            fill_carried(self.layer, self.header.carried, self.prefix, read, self.device)


def _plan(held: Sequence[_HeldLayer]) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors that the file must have for the layers of one attention, by name."""
    lengths = {one.tokens for one in held} - {None}
    if len(lengths) != 1 or 0 in lengths:
        raise CacheFileError(f"its layers hold {sorted(filter(None, lengths))} tokens, which is not a state of a cache")
    rows = next(one.rows for one in held if one.rows is not None)
    for one in held:
        yield from one.plan(rows, max(filter(None, lengths)))


class CacheFile:
    """A file whose container and header are sound; what they say is checked as it is used.

    It is open for the time of a `with` block, and every refusal within names it.

    Args:
        path: the file to read.
        calibration: where the calibration is now that the cache was made with, or None: where it was.

    Attributes:
        header: the header of the file.
        config: the cache's configuration.

    Raises:
        CacheFileError: the file is not a cache, or one that this version does not read.
        ConfigError, BackendError: the configuration in it is not available here.
    """

    def __init__(self, path: str | Path, calibration: Calibration | str | Path | None = None) -> None:
        self.path = Path(path)
        self._calibration = calibration

    def __enter__(self) -> CacheFile:
        try:
            other = find_other_kind(self.path)
            if other is not None:  # a pipe would be waited for
                raise CacheFileError(f"it is {other}, and no file")
            with ExitStack() as opened:
                self._container = ContainerReader(opened.enter_context(self.path.open("rb", buffering=0)))
                self._check_format()
                self._container.check_checksum()
                self._container.check_table()
                self.header = self._parse_header()
                self.config = self._parse_config()
                self._opened = opened.pop_all()
        except (CacheFileError, OSError) as error:
            raise CacheFileError(f"{self.path} cannot be loaded: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()
        if isinstance(error, (CacheFileError, OSError)):
            raise CacheFileError(f"{self.path} cannot be loaded: {error}") from error

    def check_model(self, model: PreTrainedModel | PretrainedConfig) -> None:
        """Check that the states in the file are those of `model`; warn where the file does not say.

        Raises:
            CacheFileError: they are of another model.
        """
        if self.header.model is None:
            warn_user(
                "the file does not say which model its states are of; save it with model=... to have that checked"
            )
            return
        check_model_matches(self.header.model, fingerprint_model(model))

    def read_layers(
        self,
        layers: list[Any],
        model: PreTrainedModel | PretrainedConfig | None,
        device: str | torch.device | None,
        cross_layers: list[Any] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Return the layers of the cache and those of its cross-attention, filled.

        Args:
            layers: the layers of a new cache with this configuration; where it has none, they are made.
            model: the model on whose devices the states live, or None.
            device: the device of all states, or None: with the model, else the CPU.
            cross_layers: the layers of the cross-attention of a new cache; None where it has no such attention.

        Raises:
            CacheFileError: what the file holds does not fit its configuration or the model.
            KVQError: the backend does not build a quantizer for such states.
        """
        self._check_attentions(has_cross=cross_layers is not None)
        own = self._prepare("layers", self.header.layers, layers, model, device)
        cross = self._prepare("cross_layers", self.header.cross_layers or [], cross_layers or [], model, device)
        groups = [own] if cross_layers is None else [own, cross]
        self._check_tensors({name: spec for group in groups for name, spec in _plan(group)})
        every = [one for group in groups for one in group]
        check_backends_match(self.header.backends, [one.layer for one in every if isinstance(one.layer, KVQLayer)])
        for one in every:
            one.fill(self._container.read)
        return [one.layer for one in own], [one.layer for one in cross]

    def _prepare(
        self,
        group: str,
        headers: list[LayerHeader],
        layers: list[Any],
        model: PreTrainedModel | PretrainedConfig | None,
        device: str | torch.device | None,
    ) -> list[_HeldLayer]:
        """Return the layers of one attention, ready to be filled."""
        filled = layers or [self._new_layer(index, header) for index, header in enumerate(headers)]
        _check_kinds(headers, filled)
        devices = find_layer_devices(model, len(filled)) if device is None else [usable_device(device)] * len(filled)
        held = [
            _HeldLayer(layer, header, f"{group}.{index}", place)
            for index, (layer, header, place) in enumerate(zip(filled, headers, devices, strict=True))
        ]
        for one in held:
            one.prepare()
        return held

    def _check_attentions(self, *, has_cross: bool) -> None:
        if has_cross == (self.header.cross_layers is not None):
            return
        if has_cross:
            raise CacheFileError("it holds no cross-attention; load it by KVQ.load")
        raise CacheFileError(
            "it holds the two attentions of an encoder-decoder model; load it by EncoderDecoderKVQ.load"
        )

    def read_token_ids(self) -> torch.Tensor | None:
        """Return the token ids `[B, T]` that were saved with the cache, or None; only after `read_layers`."""
        return None if self.header.token_ids is None else self._container.read("token_ids")

    def read_position_offsets(self) -> torch.Tensor | None:
        """Return the offsets that the model kept beside the states, or None; only after `read_layers`."""
        return None if self.header.position_offsets is None else self._container.read("position_offsets")

    def _check_format(self) -> None:
        found = self._container.metadata
        if found.get("format") != FORMAT_NAME:
            raise CacheFileError("it is a safetensors file, but of something else than a cache of kvq")
        version = found.get("format_version", "")
        if version not in map(str, READABLE_VERSIONS):
            raise CacheFileError(
                f"it has format version {version!r}, and this release of kvq reads versions "
                f"{', '.join(map(str, READABLE_VERSIONS))}; "
                "use the release that wrote it, or a newer one"
            )

    def _parse_header(self) -> CacheHeader:
        content = parse_json(self._container.metadata.get("cache", ""), "its description of the cache")
        try:
            # As JSON, where a list is what a tuple is written as.
            return CacheHeader.model_validate_json(self._container.metadata["cache"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or type(content).__name__
            raise CacheFileError(f"its header is wrong at {where}: {first['msg']}") from error

    def _parse_config(self) -> KVQCacheConfig:
        fields = move_calibration(self.header.config, self._calibration)
        config = KVQCacheConfig.from_mapping(fields, source=str(self.path))
        # The states' own type meant "with the states", also where these are on another type of device from now on.
        with_states = config.device is not None and config.device.type == self.header.states_device
        return config.replace(device=None) if with_states else config

    def _new_layer(self, index: int, header: LayerHeader) -> Any:
        carried, states = None if header.carried is None else header.carried.kind, count_states(header.carried)
        if not isinstance(header, QuantizedHeader):
            return new_layer(header.kind, _window_of(header), carried, states)
        settings, padding = self.config.for_layer(index), self.header.padding
        if settings.full_precision:
            raise CacheFileError(f"layer {index} is quantized in it, and by its configuration in full precision")
        given = None if padding is None else tuple(padding)
        if header.sliding_window is not None:
            # A file does not say whether attention is chunked; a model does.
            return SlidingKVQLayer(index, settings, header.sliding_window, given, is_chunked=True)
        return KVQLayer(index, settings, given, None if carried is None else new_beside(carried, states))

    def _check_tensors(self, planned: Mapping[str, TensorSpec]) -> None:
        found, wanted = self._container.tensors, dict(planned)
        if self.header.token_ids is not None:
            wanted["token_ids"] = TensorSpec(self.header.token_ids, torch.int64)
        if self.header.position_offsets is not None:
            offsets = self.header.position_offsets
            wanted["position_offsets"] = TensorSpec(tuple(offsets.shape), offsets.torch_dtype)
        if wanted.keys() != found.keys():
            lost, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
            raise CacheFileError(
                f"by its configuration it has other tensors: {len(lost)} are missing {lost[:2]}, "
                f"{len(extra)} are too many {extra[:2]}"
            )
        for name, spec in wanted.items():
            if found[name] != spec:
                raise CacheFileError(f"{name} is {found[name]}, and by its configuration {spec}")


def _check_kinds(headers: Sequence[LayerHeader], layers: Sequence[Any]) -> None:
    if len(layers) != len(headers):
        raise CacheFileError(f"it has {len(headers)} layers, and the cache of the model has {len(layers)}")
    for index, (layer, header) in enumerate(zip(layers, headers, strict=True)):
        carried = None if header.carried is None else header.carried.kind
        wanted = find_form(layer), _window_of(layer), find_carried_form(layer)
        if wanted != (header.kind, _window_of(header) or _unsaid_window(layer), carried):
            raise CacheFileError(
                f"layer {index} is {header.kind} in it, and a {type(layer).__name__} in the cache of the model"
            )


def _window_of(layer: object) -> int | None:
    """Return the sliding window of a layer or of its header, in tokens."""
    if isinstance(layer, SlidingKVQLayer):
        return layer.window_length
    window: int | None = getattr(layer, "sliding_window", None)
    return window


def _unsaid_window(layer: object) -> int | None:
    """Return the window of a quantized layer, of which older files hold all tokens and do not say it."""
    return layer.window_length if isinstance(layer, SlidingKVQLayer) else None
