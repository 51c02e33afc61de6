"""The hqq backend as the registry sees it; it must not import hqq, which `build` alone needs."""

from __future__ import annotations

from kvq.plugin_api import (
    API_VERSION,
    AffineQuantizer,
    BackendSpec,
    Capabilities,
    Granularity,
    QuantSpec,
    hookimpl,
)
from kvq_backends.hqq.options import HQQOptions

NBITS = (1, 1.58, 2, 3, 4, 5, 6, 8)
"""hqq's `SUPPORTED_BITS`, all of which survive a round trip through unpacked codes; 1.58 means three levels."""

AXIS_NAMES = {1: Granularity.PER_TOKEN, 0: Granularity.PER_CHANNEL}


def build(spec: QuantSpec, options: HQQOptions) -> AffineQuantizer:
    """Return the quantizer of one side of one layer; its bits are among `NBITS`, which kvq has checked."""
    from kvq_backends.hqq.quantizer import HQQQuantizer

    return HQQQuantizer(spec.nbits, optimize=options.optimize)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend."""
    return BackendSpec(
        name="hqq",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=NBITS),
        build=build,
        options=HQQOptions,
        axis_names=AXIS_NAMES,
        requires=("hqq>=0.2.8,<0.3",),
        summary="hqq: refines the zero point of each group by half-quadratic optimization; calibration-free",
        url="https://github.com/mobiusml/hqq",
    )
