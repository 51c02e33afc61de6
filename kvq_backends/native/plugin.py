"""The native backend as the registry sees it: import-light, like the backends that need a library."""

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
from kvq_backends.native.options import NativeOptions

NBITS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Every width that fits a byte; the core packs each without a wasted bit."""

AXIS_NAMES = {0: Granularity.PER_TOKEN, -1: Granularity.PER_CHANNEL}
"""The same meaning as for transformers' `QuantizedCache`: a configuration may switch to this backend."""


def build(spec: QuantSpec, options: NativeOptions) -> AffineQuantizer:
    """Return the quantizer of one side of one layer; its bits are among `NBITS`, which kvq has checked."""
    from kvq_backends.native.quantizer import NativeQuantizer

    return NativeQuantizer(int(spec.nbits), clip_candidates=options.clip_candidates if options.clip == "mse" else 0)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend."""
    return BackendSpec(
        name="native",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=NBITS),
        build=build,
        options=NativeOptions,
        axis_names=AXIS_NAMES,
        summary="torch alone: rounds to the nearest level between the extremes of each group, or clips by least error",
    )
