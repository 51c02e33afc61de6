"""The backend's declaration. It is imported when the backend is named, so it imports nothing heavy."""

from __future__ import annotations

from kvq.plugin_api import API_VERSION, AffineQuantizer, BackendSpec, Capabilities, QuantSpec, hookimpl
from kvq_template.options import TemplateOptions


def build(spec: QuantSpec, options: TemplateOptions) -> AffineQuantizer:
    """Build the quantizer of one side of one layer; import a vendor's library here."""
    from kvq_template.quantizer import TemplateQuantizer

    return TemplateQuantizer(nbits=int(spec.nbits), clip=options.clip)


@hookimpl
def kvq_backend() -> BackendSpec:
    """Return the backend; kvq calls this when somebody writes `backend="template"`."""
    return BackendSpec(
        name="template",
        api_version=API_VERSION,
        # At 2 bits only three levels are symmetric about zero: too inaccurate for the bytes, by the contract.
        capabilities=Capabilities(nbits=(3, 4, 5, 6, 7, 8)),
        build=build,
        options=TemplateOptions,
        summary="symmetric absmax rounding of each group",
        # What users get where they set nothing; other fields have kvq's own defaults.
        defaults={"nbits_k": 4, "nbits_v": 4},
    )
