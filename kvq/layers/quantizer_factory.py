"""From a layer's settings and the first states to the quantizer that its store uses."""

from __future__ import annotations

from typing import cast

import torch

from kvq.config import ResolvedLayer, ResolvedSide
from kvq.config.layer_config import BALANCE_FIELDS, CLIP_FIELDS
from kvq.config.presets import PRESET_BACKEND
from kvq.config.rounding_choice import ERROR_FEEDBACK, NEAREST, ROUNDING_FIELD
from kvq.encoding.encoder import CompiledEncoder
from kvq.errors import BackendFailedError, BrokenBackendError, CalibrationError, ConfigError, Fault, StatesError
from kvq.layers.metadata_dtypes import find_mid_dtype, find_scale_dtype
from kvq.layers.quantizer_kind import find_kind
from kvq.layers.savings import check_savings
from kvq.layers.steps import choose_clip_share, is_balanced, is_rotated
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.plugin_api.granularity import Granularity
from kvq.plugin_api.quantizer import AffineQuantizer, Quantizer, QuantSpec, Side
from kvq.plugin_api.statistics import LayerStatistics
from kvq.registry import get_registry
from kvq.store.affine import AffineCodec, balanced_group_length
from kvq.store.error_feedback import ErrorFeedback
from kvq.store.guard import GuardedQuantizer
from kvq.store.origin import Origin
from kvq.store.rotated import RotatedQuantizer
from kvq.store.rotation import HadamardRotation


def build_codec(settings: ResolvedLayer, side: Side, layer_idx: int, states: torch.Tensor) -> Quantizer:
    """Build what quantizes one side of one layer.

    Args:
        settings: the layer's settings.
        side: keys or values.
        layer_idx: index of the layer.
        states: the first states, `[B, H, T, D]`, for their shape, dtype and device.

    Raises:
        BackendError: a requirement of the backend is missing or broken, or its own code raised.
        ConfigError: the configuration makes no sense for these states.
        StatesError: the backend does not take states of this dtype or device.
        QuantizerContractError: the backend built something that is not a quantizer.
        CalibrationError: the calibration has no statistics of such states.
    """
    chosen = settings.side(side)
    _check_states(chosen.backend, states)
    get_registry().check_requirements(chosen.backend)
    spec = _build_spec(chosen, side, layer_idx, states)
    quantizer = _build(chosen, spec)
    codec = _wrap(quantizer, chosen, spec, settings.compute_dtype or torch.float32)
    check_savings(codec, chosen, spec, settings.residual_length)
    return codec


def _build_spec(chosen: ResolvedSide, side: Side, layer_idx: int, states: torch.Tensor) -> QuantSpec:
    head_dim = states.shape[-1]
    per_token = chosen.granularity is Granularity.PER_TOKEN
    group_length = balanced_group_length(head_dim, chosen.group_size) if per_token else chosen.group_size
    return QuantSpec(
        side=side,
        layer_idx=layer_idx,
        nbits=chosen.nbits,
        granularity=chosen.granularity,
        group_length=group_length,
        num_heads=states.shape[1],
        head_dim=head_dim,
        states_dtype=states.dtype,
        metadata_dtype=find_mid_dtype(chosen, group_length),
        device=states.device,
        seed=2 * layer_idx + (side == "value"),
        statistics=_find_statistics(chosen, side, layer_idx, states),
    )


def _find_statistics(chosen: ResolvedSide, side: Side, layer_idx: int, states: torch.Tensor) -> LayerStatistics | None:
    if chosen.backend.calibration == "unused" or chosen.calibration is None:
        return None
    return chosen.calibration.get(layer_idx, side, num_heads=states.shape[1], head_dim=states.shape[-1])


def _build(chosen: ResolvedSide, spec: QuantSpec) -> object:
    origin = Origin.of(chosen.backend.name, spec)
    try:
        with origin.naming("build"):
            return chosen.backend.build(spec, chosen.options)
    except BackendFailedError as error:
        # A library may be there and still not work with a new torch: its import then fails in any way.
        cause, others = error.__cause__, get_registry().describe_alternatives()
        if not isinstance(cause, ImportError):
            raise BackendFailedError(f"{error}{others}") from cause
        raise BrokenBackendError(
            f"backend {chosen.backend.name!r} is installed, but a library that it needs cannot be imported: "
            f"{cause}{others}"
        ) from cause


def _wrap(quantizer: object, chosen: ResolvedSide, spec: QuantSpec, compute_dtype: torch.dtype) -> Quantizer:
    origin = Origin.of(chosen.backend.name, spec)
    kind = find_kind(quantizer, str(origin))
    _check_rounding(quantizer, chosen)
    if kind == "general":
        _check_untouched(chosen, spec.side)
        return _guard(cast(Quantizer, quantizer), chosen, origin, spec)
    rotation = _make_rotation(spec) if is_rotated(chosen, spec) else None
    return AffineCodec(
        cast(AffineQuantizer, quantizer),
        spec,
        rotation,
        compute_dtype,
        find_scale_dtype(chosen),
        chosen.backend.name,
        balanced=is_balanced(chosen, spec),
        clip_share=choose_clip_share(chosen, spec),
        feedback=_make_feedback(chosen, spec, rotation),
        encoder=CompiledEncoder(),
    )


def _guard(quantizer: Quantizer, chosen: ResolvedSide, origin: Origin, spec: QuantSpec) -> Quantizer:
    """Wrap a backend's own quantizer; it is rotated where that is asked for, since `auto` leaves it as it is."""
    if chosen.rotation == "hadamard":
        return RotatedQuantizer(quantizer, origin, spec, _make_rotation(spec))
    return GuardedQuantizer(quantizer, origin, spec)


def _make_rotation(spec: QuantSpec) -> HadamardRotation:
    return HadamardRotation(spec.head_dim, spec.seed, spec.device)


def _make_feedback(chosen: ResolvedSide, spec: QuantSpec, rotation: HadamardRotation | None) -> ErrorFeedback | None:
    if chosen.rounding != ERROR_FEEDBACK or chosen.calibration is None:
        return None
    own = chosen.calibration.get(spec.layer_idx, spec.side, num_heads=spec.num_heads, head_dim=spec.head_dim)
    if own.query_moment is None or not own.query_moment.isfinite().all():
        raise CalibrationError(
            f"calibration {chosen.calibration} has no queries of the shape of the keys in layer {spec.layer_idx}: "
            f"{ROUNDING_FIELD}={ERROR_FEEDBACK!r} needs them; set {NEAREST!r} there"
        )
    return ErrorFeedback(own, rotation)


def _check_rounding(quantizer: object, chosen: ResolvedSide) -> None:
    """Refuse to choose other codes than those of a backend that chooses them in a way of its own."""
    if chosen.rounding == ERROR_FEEDBACK and not getattr(quantizer, "rounds_to_nearest", False):
        problem = (
            f"{chosen.backend.name} does not say that it rounds to nearest, so its codes are its own to choose; use "
            f"{NEAREST!r}, or keys by a backend that says so, as {PRESET_BACKEND!r} without options does"
        )
        raise ConfigError([Fault((ROUNDING_FIELD,), problem)])


def _check_untouched(chosen: ResolvedSide, side: Side) -> None:
    """Refuse the steps for which a representation of its own has no room, or no groups."""
    given = {BALANCE_FIELDS[side]: (chosen.balance, "balance"), CLIP_FIELDS[side]: (chosen.clip, "clip")}
    problem = "{} stores its own representation, which the core cannot {}; use 'none' or 'auto'"
    faults = [
        Fault((field,), problem.format(chosen.backend.name, verb))
        for field, (value, verb) in given.items()
        if value not in ("none", "auto")
    ]
    if faults:
        raise ConfigError(faults)


def _check_states(backend: BackendSpec, states: torch.Tensor) -> None:
    accepted = backend.capabilities
    dtype, device = str(states.dtype).removeprefix("torch."), states.device.type
    for kind, found, choices in (
        ("dtype", dtype, accepted.states_dtypes),
        ("device", device, accepted.device_types),
    ):
        if choices and found not in choices:
            raise StatesError(f"{backend.name}: states of {kind} {found!r} are not supported; it takes {choices}")
