"""What the backend says of itself; imported when it is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, AffineQuantizer, BackendSpec, Capabilities, QuantSpec, hookimpl
from kvq_template.options import TemplateOptions


def build(spec: QuantSpec, options: TemplateOptions) -> AffineQuantizer:
    """Build the quantizer of one side of one layer; the place to import a vendor's library."""
    from kvq_template.quantizer import AbsmaxQuantizer

    return AbsmaxQuantizer(nbits=int(spec.nbits), clip=options.clip)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="template"`."""
    return BackendSpec(
        name="template",
        api_version=API_VERSION,
        # At 2 bits three levels are all that is symmetric about zero: the contract finds that too few for the bytes.
        capabilities=Capabilities(nbits=(3, 4, 5, 6, 7, 8)),
        build=build,
        options=TemplateOptions,
        summary="symmetric absmax rounding, an example to copy",
    )
