"""The backend's declaration. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import (
    API_VERSION,
    AffineQuantizer,
    BackendSpec,
    Capabilities,
    Granularity,
    Quantizer,
    QuantSpec,
    hookimpl,
)
from kvq_mixed.options import MixedOptions

MIXED = 2.25
"""Bits of an element: an eighth of the channels have 4, the others 2."""


def build(spec: QuantSpec, options: MixedOptions) -> AffineQuantizer | Quantizer:
    """Return the quantizer of one side of one layer: of 2 bits everywhere, or mixed."""
    if spec.nbits != MIXED:
        from kvq_mixed.plain_quantizer import PlainQuantizer

        return PlainQuantizer()
    from kvq_mixed.quantizer import MixedQuantizer

    return MixedQuantizer(spec, by_scores=options.choose_by == "scores")


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="mixed"`."""
    return BackendSpec(
        name="mixed",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(2, MIXED), granularities=(Granularity.PER_CHANNEL,)),
        build=build,
        options=MixedOptions,
        summary="2-bit keys, an eighth of the channels at 4 bits; chooses them by statistics of the model",
        url="https://arxiv.org/abs/2511.18643",
        defaults={"nbits_k": MIXED, "nbits_v": 2, "axis_key": "per_channel", "axis_value": "per_channel"},
        calibration="optional",
    )
