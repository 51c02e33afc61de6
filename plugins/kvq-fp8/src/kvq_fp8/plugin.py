"""The backend's declaration. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Quantizer, QuantSpec, hookimpl
from kvq_fp8.options import Float8Options


def build(spec: QuantSpec, options: Float8Options) -> Quantizer:
    """Return the quantizer of one side of one layer."""
    from kvq_fp8.quantizer import Float8Quantizer

    return Float8Quantizer(options.format, spec.granularity, spec.head_dim, spec.group_length)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="fp8"`."""
    return BackendSpec(
        name="fp8",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(8,)),
        build=build,
        options=Float8Options,
        summary="float8 e4m3 or e5m2, one scale for each token's vector or for each channel of a block",
        url="https://arxiv.org/abs/2209.05433",
        defaults={"nbits_k": 8, "nbits_v": 8},
    )
