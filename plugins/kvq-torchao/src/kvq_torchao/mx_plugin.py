"""The declaration of the MX formats. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, Granularity, Quantizer, QuantSpec, hookimpl
from kvq_torchao.mx_options import MXOptions
from kvq_torchao.requirement import TORCHAO


def build(spec: QuantSpec, options: MXOptions) -> Quantizer:
    """Return the quantizer of one side of one layer."""
    from kvq_torchao.mx_quantizer import MXQuantizer

    return MXQuantizer(spec.head_dim, int(spec.nbits), options.scaling)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="torchao-mx"`."""
    return BackendSpec(
        name="torchao-mx",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(4, 6), granularities=(Granularity.PER_TOKEN,)),
        build=build,
        options=MXOptions,
        requires=(TORCHAO,),
        summary="MXFP4 and MXFP6 by torchao's prototype: floating-point codes, a power of two for 32 elements",
        url="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
        defaults={"nbits_k": 4, "nbits_v": 4, "axis_key": "per_token", "axis_value": "per_token"},
        uses_group_size=False,
    )
