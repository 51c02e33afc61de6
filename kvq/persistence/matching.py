"""Whether a file belongs to the model and to the backends that are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from kvq.calibration import Calibration
from kvq.errors import CacheFileError, ConfigError, Fault
from kvq.files.model_fingerprint import ModelFingerprint, explain_difference
from kvq.layers.quantized_layer import KVQLayer
from kvq.persistence.fingerprint import fingerprint_backends, fingerprint_model
from kvq.persistence.header import BackendFingerprint
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.store.affine import AffineCodec
from kvq.user_warnings import warn_user


def check_model_matches(saved: ModelFingerprint, here: ModelFingerprint) -> None:
    """Check that states that were saved are those of the model here.

    Raises:
        CacheFileError: they are of another model.
    """
    difference = explain_difference(saved, here)
    if difference is not None:
        raise CacheFileError(f"its states are those of another model: {difference}")


def check_calibration_matches(
    calibration: Calibration | None, model: PreTrainedModel | PretrainedConfig | None
) -> None:
    """Check that statistics that a configuration names, if it does, were collected on the model here.

    Raises:
        ConfigError: they are of another model.
    """
    if calibration is None or calibration.model is None or model is None:
        return
    difference = explain_difference(calibration.model, fingerprint_model(model))
    if difference is not None:
        problem = f"{calibration} is of another model: {difference}; run `kvq calibrate` on this one"
        raise ConfigError([Fault(("calibration",), problem)])


def check_backends_match(saved: Mapping[str, BackendFingerprint], layers: Sequence[KVQLayer]) -> None:
    """Refuse what another release of a backend may decode in another way; warn where it may only encode so.

    Args:
        saved: the backends in the file.
        layers: the layers, prepared for the states in the file.

    Raises:
        CacheFileError: a backend with a representation of its own is of another release here.
    """
    chosen = {name: backend for layer in layers for name, backend in _backends(layer).items()}
    here = fingerprint_backends(chosen.values())
    own_ways = {
        layer.settings.side(name).backend.name
        for layer in layers
        for name, side in layer.sides()
        if not isinstance(side.codec, AffineCodec)
    }
    if saved.keys() != here.keys():
        raise CacheFileError(f"it names the backends {sorted(saved)}, and its configuration {sorted(here)}")
    for name, release in saved.items():
        if name in own_ways and release != here[name]:
            raise CacheFileError(
                f"backend {name!r} stores in a way of its own, and was {_describe(release)} when the file was written, "
                f"but is {_describe(here[name])} here"
            )
        if release.requires != here[name].requires:
            warn_user(
                f"backend {name!r} was {_describe(release)} when the file was written and is {_describe(here[name])} "
                "here: stored tokens stay as they are, new ones may be rounded differently"
            )


def _backends(layer: KVQLayer) -> dict[str, BackendSpec]:
    return {side.backend.name: side.backend for side in (layer.settings.key, layer.settings.value)}


def _describe(backend: BackendFingerprint) -> str:
    parts = [backend.origin, *(f"{name} {version}" for name, version in backend.requires.items())]
    return " with ".join(filter(None, parts)) or "of no distribution"
