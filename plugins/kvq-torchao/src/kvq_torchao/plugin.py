"""The affine backend's declaration. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, AffineQuantizer, BackendSpec, Capabilities, QuantSpec, hookimpl
from kvq_torchao.options import TorchAOOptions
from kvq_torchao.requirement import TORCHAO


def build(spec: QuantSpec, options: TorchAOOptions) -> AffineQuantizer:
    """Return the quantizer of one side of one layer."""
    from kvq_torchao.quantizer import TorchAOQuantizer

    return TorchAOQuantizer(int(spec.nbits), preserve_zero=options.preserve_zero)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="torchao"`."""
    return BackendSpec(
        name="torchao",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(1, 2, 3, 4, 5, 6, 7, 8)),
        build=build,
        options=TorchAOOptions,
        requires=(TORCHAO,),
        summary="torchao's affine primitives: rounds to the nearest level between the extremes of each group",
        url="https://github.com/pytorch/ao",
        defaults={"nbits_k": 4, "nbits_v": 4},
    )
