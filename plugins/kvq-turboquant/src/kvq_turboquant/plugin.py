"""The backend's declaration. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, KVQError, Quantizer, QuantSpec, hookimpl
from kvq_turboquant.options import TurboQuantOptions

NBITS = (2, 2.5, 3, 3.5, 4)
"""Bits per element without the norms; at a fractional rate half of the channels get one bit more than the others."""
LEAST_HEAD_DIM = 4


def build(spec: QuantSpec, options: TurboQuantOptions) -> Quantizer:
    """Return the quantizer of one side of one layer.

    Raises:
        KVQError: the vectors are too short to rotate.
    """
    if spec.head_dim < LEAST_HEAD_DIM:
        raise KVQError(
            f"turboquant: head_dim={spec.head_dim} is not supported (the {spec.side}s of layer {spec.layer_idx}); "
            f"it takes vectors of at least {LEAST_HEAD_DIM} elements; choose another backend"
        )
    from kvq_turboquant.hadamard_vectors import HadamardVectors
    from kvq_turboquant.quantizer import TurboQuantizer

    is_whole = spec.nbits == int(spec.nbits) and spec.head_dim & (spec.head_dim - 1) == 0
    if options.rotation == "auto" and is_whole and not options.inner_product:
        return HadamardVectors(spec, options.seed)
    return TurboQuantizer(
        spec.head_dim, spec.nbits, spec.device, inner_product=options.inner_product, seed=options.seed
    )


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="turboquant"`."""
    return BackendSpec(
        name="turboquant",
        api_version=API_VERSION,
        # A vector is always a token's. Both axis words are accepted: neither makes a difference.
        capabilities=Capabilities(nbits=NBITS),
        build=build,
        options=TurboQuantOptions,
        summary="TurboQuant: random rotation, per-vector norm, optimal scalar codebook; axes make no difference",
        url="https://arxiv.org/abs/2504.19874",
        defaults={"nbits_k": 4, "nbits_v": 3},
        uses_group_size=False,
    )
