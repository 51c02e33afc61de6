"""From a file to the layers of a cache.

A file is refused before anything is built from it: first the container, then the header, then the model, then the plan
of tensors that the quantizers' own layouts ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvq.config import KVQCacheConfig
from kvq.errors import CacheFileError
from kvq.layer import KVQLayer
from kvq.persistence.container import ContainerReader, TensorSpec, parse_json
from kvq.persistence.fingerprint import find_layer_devices, fingerprint_backends, fingerprint_model
from kvq.persistence.header import (
    FORMAT_NAME,
    FORMAT_VERSION,
    BackendFingerprint,
    CacheHeader,
    LayerHeader,
    ModelFingerprint,
)
from kvq.persistence.layer_format import format_of
from kvq.store.affine import AffineCodec
from kvq.user_warnings import warn_user


class CacheFile:
    """A file whose container and header are sound; what they say is checked as it is used.

    It is open for the time of a `with` block, and every refusal within names it.

    Args:
        path: of the file.

    Attributes:
        header: what the file says of itself.
        config: of the cache.

    Raises:
        CacheFileError: the file is no cache, or one that this version does not read.
        ConfigError, BackendError: the configuration in it cannot be had here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> CacheFile:
        try:
            with ExitStack() as opened:
                self._container = ContainerReader(opened.enter_context(self.path.open("rb", buffering=0)))
                self._check_format()
                self._container.check_checksum()
                self._container.check_table()
                self.header = self._parse_header()
                self.config = KVQCacheConfig.from_mapping(self.header.config, source=str(self.path))
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
        """Check that the states in the file are those of `model`; warn where the file does not tell.

        Raises:
            CacheFileError: they are of another model.
        """
        if self.header.model is None:
            warn_user(
                "the file does not tell of which model its states are; save it with model=... to have that checked"
            )
            return
        _check_fingerprint(self.header.model, fingerprint_model(model))

    def read_layers(
        self,
        layers: list[Any],
        model: PreTrainedModel | PretrainedConfig | None,
        device: str | torch.device | None,
    ) -> list[Any]:
        """Return the layers of the cache, filled.

        Args:
            layers: as a new cache of this configuration has them; where it has none, they are made.
            model: whose layers tell where the states live, or None.
            device: where the states of all layers live, or None: with the model, else on the CPU.

        Raises:
            CacheFileError: what the file holds does not fit its configuration or the model.
            KVQError: the backend does not build a quantizer for such states.
        """
        headers = self.header.layers
        filled = layers or [self._new_layer(index, header) for index, header in enumerate(headers)]
        self._check_kinds(filled)
        devices = find_layer_devices(model, len(filled)) if device is None else [_check_device(device)] * len(filled)
        held = [
            (layer, header.states, format_of(header), f"layers.{index}", where)
            for index, (layer, header, where) in enumerate(zip(filled, headers, devices, strict=True))
            if header.states is not None
        ]
        for layer, states, form, _, where in held:
            form.prepare(layer, states, where)
        lengths = {form.count_tokens(layer, states) for layer, states, form, _, _ in held}
        if len(lengths) != 1 or 0 in lengths:
            raise CacheFileError(f"its layers hold {sorted(lengths)} tokens, which is no state of a cache")
        wanted = {
            name: spec for layer, states, form, place, _ in held for name, spec in form.plan(layer, states, place)
        }
        self._check_tensors(wanted)
        self._check_backends(filled)
        for layer, states, form, place, _ in held:
            form.fill(layer, states, place, self._container.read)
        return filled

    def read_token_ids(self) -> torch.Tensor | None:
        """Return the token ids `[B, T]` that were saved with the cache, or None; only after `read_layers`."""
        return None if self.header.token_ids is None else self._container.read("token_ids")

    def _check_format(self) -> None:
        found = self._container.metadata
        if found.get("format") != FORMAT_NAME:
            raise CacheFileError("it is a safetensors file, but of something else than a cache of kvq")
        version = found.get("format_version", "")
        if version != str(FORMAT_VERSION):
            raise CacheFileError(
                f"it has format version {version!r}, and this release of kvq reads version {FORMAT_VERSION}; "
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

    def _new_layer(self, index: int, header: LayerHeader) -> Any:
        if header.kind == "dynamic":
            return DynamicLayer()
        if header.kind == "sliding":
            return DynamicSlidingWindowLayer(header.sliding_window)
        padding = self.header.padding
        return KVQLayer(index, self.config.for_layer(index), None if padding is None else tuple(padding))

    def _check_kinds(self, layers: Sequence[Any]) -> None:
        headers = self.header.layers
        if len(layers) != len(headers):
            raise CacheFileError(f"it has {len(headers)} layers, and the cache of the model has {len(layers)}")
        for index, (layer, header) in enumerate(zip(layers, headers, strict=True)):
            if _kind_of(layer) != (header.kind, getattr(header, "sliding_window", None)):
                raise CacheFileError(
                    f"layer {index} is {header.kind} in it, and a {type(layer).__name__} in the cache of the model"
                )

    def _check_tensors(self, planned: Mapping[str, TensorSpec]) -> None:
        found, wanted = self._container.tensors, dict(planned)
        if self.header.token_ids is not None:
            wanted["token_ids"] = TensorSpec(self.header.token_ids, torch.int64)
        if wanted.keys() != found.keys():
            lost, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
            raise CacheFileError(
                f"by its configuration it has other tensors: {len(lost)} are missing {lost[:2]}, "
                f"{len(extra)} are too many {extra[:2]}"
            )
        for name, spec in wanted.items():
            if found[name] != spec:
                raise CacheFileError(f"{name} is {found[name]}, and by its configuration {spec}")

    def _check_backends(self, layers: Sequence[Any]) -> None:
        """Refuse what another release of a backend may decode in another way; warn where it may only encode so."""
        quantized = [layer for layer in layers if isinstance(layer, KVQLayer)]
        specs = {side.backend.name: side.backend for layer in quantized for side in _settings(layer)}
        here = fingerprint_backends(specs.values())
        own_ways = {
            settings.backend.name
            for layer in quantized
            for (_, side), settings in zip(layer.sides(), _settings(layer), strict=False)
            if not isinstance(side.quantizer, AffineCodec)
        }
        if self.header.backends.keys() != here.keys():
            raise CacheFileError(f"it names backends {sorted(self.header.backends)}, and uses {sorted(here)}")
        for name, saved in self.header.backends.items():
            if name in own_ways and saved != here[name]:
                raise CacheFileError(
                    f"backend {name!r} stores in a way of its own, and was {_release(saved)} when it was written, but is "
                    f"{_release(here[name])} here"
                )
            if saved.requires != here[name].requires:
                warn_user(
                    f"backend {name!r} was {_release(saved)} when the file was written and is {_release(here[name])} "
                    "here: what is stored stays as it is, what is added may be rounded in another way"
                )


def _check_fingerprint(saved: ModelFingerprint, here: ModelFingerprint) -> None:
    differing = [
        f"{name} is {saved.facts.get(name)!r} there and {here.facts.get(name)!r} here"
        for name in sorted({*saved.facts, *here.facts})
        if saved.facts.get(name) != here.facts.get(name)
    ]
    if differing:
        raise CacheFileError(f"its states are those of another model: {'; '.join(differing)}")
    there, own = ({sample.name: sample.digest for sample in one.weights} for one in (saved, here))
    differing = [name for name in there.keys() & own.keys() if there[name] != own[name]]
    if differing:
        raise CacheFileError(f"its states are those of another model: the weights of {', '.join(differing)} differ")


def _kind_of(layer: Any) -> tuple[str, int | None]:
    if isinstance(layer, KVQLayer):
        return "quantized", None
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding", layer.sliding_window
    return ("dynamic", None) if type(layer) is DynamicLayer else ("unknown", None)


def _settings(layer: KVQLayer) -> tuple[Any, Any]:
    return layer.settings.key, layer.settings.value


def _release(backend: BackendFingerprint) -> str:
    parts = [backend.origin, *(f"{name} {version}" for name, version in backend.requires.items())]
    return " with ".join(filter(None, parts)) or "of no distribution"


def _check_device(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CacheFileError(f"device {str(device)!r} cannot be used here: {error}") from error
    return checked
