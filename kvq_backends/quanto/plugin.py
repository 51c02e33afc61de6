"""The quanto backend as the registry sees it; it must not import optimum.quanto, which `build` alone needs."""

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
from kvq_backends.quanto.options import QuantoOptions

NBITS = (2, 4, 8)
"""The integer types of quanto 0.2.7: qint2, qint4, qint8. Its other types are float8, which are no affine codes."""

AXIS_NAMES = {0: Granularity.PER_TOKEN, -1: Granularity.PER_CHANNEL}


def build(spec: QuantSpec, options: QuantoOptions) -> AffineQuantizer:
    """Return the quantizer of one side of one layer; its bits are among `NBITS`, which kvq has checked."""
    from kvq_backends.quanto.quantizer import QuantoQuantizer

    return QuantoQuantizer(int(spec.nbits), symmetric_8bit=options.symmetric_8bit)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend."""
    return BackendSpec(
        name="quanto",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=NBITS),
        build=build,
        options=QuantoOptions,
        axis_names=AXIS_NAMES,
        requires=("optimum-quanto>=0.2.7,<0.3",),
        summary="optimum-quanto: rounds to the nearest level between the extremes of each group; calibration-free",
        url="https://github.com/huggingface/optimum-quanto",
    )
